"""Regions by hand: paint them over the last picture, or start from the region that was found in it and correct it."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image, ImageFilter

from mole_diffusers.app import draw_over
from mole_diffusers.app.actions import Picture
from mole_diffusers.app.draw_over import COLOUR, OPACITY
from mole_diffusers.app.mixer_cards import MixerCard, parse_named, shades
from mole_diffusers.app.page import ORDERED, Page, Values
from mole_diffusers.app.sentences import errors_to, markdown
from mole_diffusers.app.style import figure, status_line
from mole_diffusers.binding.as_text import mask_text, parse_region, read_mask
from mole_diffusers.binding.regions import BOXES, region_mask
from mole_diffusers.inspection.layout_figure import as_grey, overlay
from mole_diffusers.studio.prompt_syntax import PAINTED

CANVAS, MASK_SIDE = 512, 128  # longer side in pixels


def build(page: Page) -> None:
    """Lay out the panel and connect it."""
    found = figure(label="Where each LoRA acted in the last picture", visible=False, buttons=[], elem_id="found")
    with gr.Accordion("Regions: paint where a LoRA acts", open=False, elem_id="regions") as panel:
        which = gr.Dropdown([], label="Paint the region of", elem_id="paint-of", interactive=True)
        with gr.Row():
            over = gr.Button("Start from what it has", size="sm", elem_id="paint-found")
            empty = gr.Button("Start empty", size="sm", elem_id="paint-empty")
        square: dict[str, Any] = {"fixed_canvas": True, "canvas_size": (CANVAS, CANVAS)}
        editor = draw_over.editor(label="Paint where it acts", sources=(), elem_id="paint", **square)
        edge = gr.Slider(0, 0.2, 0.0, step=0.01, label="Soft edge", info="a share of the picture", elem_id="edge")
        use = gr.Button("Use as its region", variant="primary", elem_id="paint-use")
        status = status_line(elem_id="paint-status")

    def last(request: gr.Request) -> Picture | None:
        """The last picture of this page whose file is still there."""
        return next((picture for picture in reversed(page.drawn(request)) if picture.path.exists()), None)

    def names(cards: list[MixerCard], chosen: str | None) -> Any:
        known = [card["name"] for card in cards]
        return gr.update(choices=known, value=chosen if chosen in known else next(iter(known), None))

    def overlaid(request: gr.Request, cards: list[MixerCard]) -> Any:
        picture = last(request)
        if picture is None or picture.layout is None or not picture.layout.regions:
            return gr.update(visible=False)
        return gr.update(value=overlay(Image.open(picture.path), picture.layout, shades=shades(cards)), visible=True)

    @errors_to(status)
    def start(
        request: gr.Request, name: str | None, masks: dict[str, str], text: str, width: int | None, height: int | None
    ) -> Values:
        picture = last(request)
        own = (picture.recipe.width, picture.recipe.height) if picture else page.actions.usual_size(text)
        region = current_region(parse_named(text, page.actions.studio.catalog.loras).tags, name, masks, picture)
        return {editor: canvas(picture, width or own[0], height or own[1], region)}

    def opened(request: gr.Request, painted: dict[str, Any] | None, *given: Any) -> Any:
        """Start when the panel is opened, but keep what is in the editor already: it may be paint that is not used yet."""
        return start(request, *given) if painted is None or painted["background"] is None else gr.skip()

    @errors_to(status)
    def used(name: str | None, painted: Any, edge: float, masks: dict[str, str], *now: Any) -> Values:
        if not name:
            raise ValueError("choose the LoRA whose region this is")
        found = {**masks, name: mask_text(painted_mask(painted, edge))}
        words = f"**{markdown(name)}** acts there from now on"
        return page.edited([name], *now, region=PAINTED) | {page.masks: found, status: words}

    page.shown.change(names, [page.cards, which], which, show_progress="hidden")
    page.pictures.change(overlaid, page.cards, found, show_progress="hidden")
    given = [which, page.masks, *(page.controls[name] for name in ("prompt", "width", "height"))]
    panel.expand(opened, [editor, *given], [editor, status])
    gr.on([over.click, which.input], start, given, [editor, status], trigger_mode="always_last")
    empty.click(start, [gr.State(), *given[1:]], [editor, status])
    given = [which, editor, edge, page.masks, *page.written]
    use.click(used, given, [page.masks, *page.written, page.shown, status], **ORDERED)


def canvas(picture: Picture | None, width: int, height: int, mask: Image.Image | None) -> dict[str, Any]:
    """A value for the editor: a mask as paint, over a picture, or over grey of this shape."""
    side = _fitted(width, height, CANVAS)
    background = Image.new("RGB", side, "#dddddd")
    if picture is not None:
        background = Image.open(picture.path).convert("RGB").resize(side)
    paint = Image.new("RGBA", side, (*COLOUR, 0))
    if mask is not None:
        paint.putalpha(mask.resize(side, Image.Resampling.NEAREST).point([value * OPACITY // 255 for value in range(256)]))
    both = Image.alpha_composite(background.convert("RGBA"), paint)
    return {"background": background, "layers": [paint], "composite": both}


def current_region(tags: Any, name: str | None, masks: dict[str, str], picture: Picture | None) -> Image.Image | None:
    """The current region of a LoRA, in grey: painted, a box, or found in the last picture; None if it has none."""
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
        # The editor's canvas is square. Above and below a wide picture it is empty.
        picture = value["background"].convert("RGBA").getchannel("A").getbbox()
        mask = draw_over.paint(value).crop(picture).point([min(round(255 * paint / OPACITY), 255) for paint in range(256)])
    if mask.getbbox() is None:
        raise ValueError("nothing is painted: draw where the LoRA acts, then use it")
    mask = mask.resize(_fitted(*mask.size, MASK_SIDE), Image.Resampling.BOX)
    return mask.filter(ImageFilter.GaussianBlur(edge * MASK_SIDE / 2)) if edge else mask


def _fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """The size with the same proportions whose longer side is `side`."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
