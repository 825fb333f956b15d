"""Regions by hand: paint on the large picture where a LoRA acts, in the LoRA's own colour."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image, ImageColor, ImageFilter

from mole_diffusers.app import draw_over
from mole_diffusers.app.actions import Picture
from mole_diffusers.app.draw_over import OPACITY
from mole_diffusers.app.mixer_cards import MixerCard, parse_named, shades
from mole_diffusers.app.page import Page
from mole_diffusers.app.prompt_box import ORDERED
from mole_diffusers.app.sentences import errors_to, markdown
from mole_diffusers.app.stage import Stage
from mole_diffusers.app.style import Values
from mole_diffusers.binding.as_text import mask_text, parse_region, read_mask
from mole_diffusers.binding.regions import BOXES, region_mask
from mole_diffusers.inspection.layout_figure import as_grey
from mole_diffusers.studio.prompt_syntax import PAINTED
from mole_diffusers.studio.recipe import Recipe

CANVAS, MASK_SIDE = 1024, 128  # longer side in pixels


class Painting:
    """The editor in place of the large picture, and its tools. It is seen while a region is painted.

    Attributes:
        which: the LoRA whose region is painted.
    """

    def __init__(self, page: Page, stage: Stage):
        self.page, self.stage = page, stage
        # It is hidden by `page.css` while the picture is seen: an editor that is just made loses the paint it is given.
        with gr.Column(elem_id="painting"):
            self.editor = draw_over.editor(label="Paint where it acts", sources=(), show_label=False, elem_id="paint")
            with gr.Row(elem_id="paint-tools"):
                self.which = gr.Dropdown(
                    [], label="Paint where this acts", min_width=140, elem_id="paint-of", interactive=True
                )
                self.edge = gr.Slider(0, 0.2, 0.0, step=0.01, label="Soft edge", min_width=140, elem_id="edge")
            with gr.Row():
                self.use = gr.Button("Use this region", size="sm", variant="primary", min_width=100, elem_id="paint-use")
                self.empty = gr.Button("Start empty", size="sm", min_width=90, elem_id="paint-empty")
                self.back = gr.Button("Back to the picture", size="sm", min_width=100, elem_id="paint-back")

    def connect(self, opens: Any) -> None:
        """Connect it. `opens` is the button that opens it; a card that is switched to painted does so, too."""
        page, stage = self.page, self.stage
        panels = [stage.picture, self.editor, self.which, stage.status]

        @errors_to(stage.status)
        def opened(
            request: gr.Request, visitor: str, keep: bool, name: str | None, shown: str, cards: list[MixerCard],
            masks: dict[str, str], *now: Any,
        ) -> Values:  # fmt: skip
            """Open the editor with a LoRA's present region, or empty."""
            text, width, height = now
            names = [card["name"] for card in cards]
            if not names:
                raise ValueError("add a LoRA first: a region is where one acts")
            name = name if name is not None and name in names else names[0]
            picture = next((each for each in page.visits.drawn(request, visitor) if each.path.name == shown), None)
            background = picture.path if picture else page.actions.gallery.folder / shown if shown else None
            own = picture_size(background) or page.actions.size_of(Recipe(text, width=width or 0, height=height or 0))
            tags = parse_named(text, page.actions.studio.catalog.loras).tags
            region = current_region(tags, name, masks, picture) if keep else None
            colour = ImageColor.getrgb(shades(cards)[name])[:3]
            return {
                stage.picture: gr.update(visible=False),
                self.editor: gr.update(value=canvas(background, own, region, colour), brush=draw_over.brush(colour)),
                self.which: gr.update(choices=names, value=name),
            }

        def by_card(request: gr.Request, visitor: str, keep: bool, asked: Any, *given: Any) -> Values:
            return opened(request, visitor, keep, asked[0], *given)

        @errors_to(stage.status)
        def used(name: str | None, painted: Any, edge: float, masks: dict[str, str], *now: Any) -> Values:
            if not name:
                raise ValueError("choose the LoRA whose region this is")
            found = {**masks, name: mask_text(painted_mask(painted, edge))}
            said = f"**{markdown(name)}** acts in what you painted, from the next picture on"
            shown = {page.form.masks: found, stage.status: said, stage.picture: gr.update(visible=True)}
            return page.prompt.edited([name], *now, region=PAINTED) | shown

        sizes = [page.form.controls[name] for name in ("width", "height")]
        given = [page.showing, page.prompt.cards, page.form.masks, page.prompt.text, *sizes]
        visitor, present, nothing = page.visits.visitor, gr.State(True), gr.State(False)
        opens.click(opened, [visitor, present, self.which, *given], panels)
        page.prompt.to_paint.change(by_card, [visitor, present, page.prompt.to_paint, *given], panels)
        self.which.input(opened, [visitor, present, self.which, *given], panels, trigger_mode="always_last")
        self.empty.click(opened, [visitor, nothing, self.which, *given], panels)
        self.back.click(lambda: gr.update(visible=True), None, stage.picture)
        taken = [page.form.masks, *page.prompt.written, page.prompt.shown, *panels]
        self.use.click(used, [self.which, self.editor, self.edge, page.form.masks, *page.prompt.written], taken, **ORDERED)


def picture_size(path: Any) -> tuple[int, int] | None:
    """The size in pixels of a picture file; None if there is none."""
    if path is None or not path.exists():
        return None
    with Image.open(path) as image:
        return image.size


def canvas(path: Any, size: tuple[int, int], mask: Image.Image | None, colour: tuple[int, ...]) -> dict[str, Any]:
    """A value for the editor: a mask as paint in a colour, over a picture, or over grey of this size if there is none."""
    side = fitted(*size, CANVAS)
    background = Image.new("RGB", side, "#dddddd")
    if path is not None and path.exists():
        background = Image.open(path).convert("RGB").resize(side, Image.Resampling.LANCZOS)
    paint = Image.new("RGBA", side, (*colour, 0))
    if mask is not None:
        paint.putalpha(mask.resize(side, Image.Resampling.NEAREST).point([value * OPACITY // 255 for value in range(256)]))
    both = Image.alpha_composite(background.convert("RGBA"), paint)
    return {"background": background, "layers": [paint], "composite": both}


def current_region(tags: Any, name: str | None, masks: dict[str, str], picture: Picture | None) -> Image.Image | None:
    """The current region of a LoRA, in grey: painted, a box, or found in the picture; None if it has none."""
    region = parse_region(next((tag.region for tag in tags if tag.name == name), ""))
    if region == PAINTED and name in masks:
        return read_mask(masks[name])
    if region in BOXES or isinstance(region, tuple):
        return as_grey(region_mask(region, MASK_SIDE, MASK_SIDE))
    if picture is not None and picture.layout is not None and name in picture.layout.regions:
        return as_grey(picture.layout.regions[name])
    return None


def painted_mask(value: dict[str, Any] | None, edge: float) -> Image.Image:
    """Paint in an editor -> a mask for its picture: white where there is paint, grey where there is less of it.

    Args:
        edge: width of the soft edge, as a share of the longer side.

    Raises ValueError if nothing is painted.
    """
    mask = Image.new("L", (1, 1))
    if value is not None and value["background"] is not None:
        # The editor's canvas may be larger than the picture, and is empty around it.
        picture = value["background"].convert("RGBA").getchannel("A").getbbox()
        mask = draw_over.paint(value).crop(picture).point([min(round(255 * paint / OPACITY), 255) for paint in range(256)])
    if mask.getbbox() is None:
        raise ValueError("nothing is painted: draw where the LoRA acts, then use it")
    mask = mask.resize(fitted(*mask.size, MASK_SIDE), Image.Resampling.BOX)
    return mask.filter(ImageFilter.GaussianBlur(edge * MASK_SIDE / 2)) if edge else mask


def fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """The size with the same proportions whose longer side is `side`."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
