"""Regions by hand: paint on the large picture where a LoRA acts, in the LoRA's own colour."""

from __future__ import annotations

import base64
import html
from io import BytesIO
from typing import Any

import gradio as gr
from PIL import Image, ImageColor, ImageFilter

from mole_app.studio.prompt_syntax import PAINTED
from mole_app.studio.recipe import Recipe
from mole_app.web.actions import Picture
from mole_app.web.mixer_cards import MixerCard, parse_named, shades
from mole_app.web.page import Page
from mole_app.web.prompt_box import ORDERED
from mole_app.web.sentences import errors_to, markdown
from mole_app.web.stage import Stage
from mole_app.web.style import Values
from mole_diffusers.binding import BOXES, mask_text, parse_region, read_mask, region_mask
from mole_diffusers.inspection import as_grey

SHEET, MASK_SIDE = 512, 128  # longer side in pixels
# What is painted is sent as a mask in grey, as `read_mask` reads it.
SENT = """(name, _, ...rest) => [name, maskOf(document.querySelector("#sheet")), ...rest]"""
EMPTY = """() => { const sheet = document.querySelector("#sheet"); sheet.width = sheet.width; }"""


class Painting:
    """A sheet over the large picture, and its tools, which are seen while there is a sheet. The brush is in `page.html`.

    Attributes:
        sheet: the sheet (HTML), "" unless a region is painted. It is laid out over the picture.
        which: the LoRA whose region is painted.
    """

    def __init__(self, page: Page, stage: Stage):
        self.page, self.stage = page, stage
        self.sheet = gr.HTML("", elem_id="paint", padding=False)
        self.painted = gr.Textbox(visible=False)  # what the browser sends of the sheet

    def build_tools(self) -> None:
        """Lay out what is below the picture while a region is painted."""
        with gr.Column(elem_id="painting"):
            with gr.Row(elem_id="paint-tools"):
                self.which = gr.Dropdown(
                    [], label="Paint where this acts", min_width=140, elem_id="paint-of", interactive=True
                )
                gr.Slider(1, 25, 6, step=1, label="Brush", min_width=140, elem_id="brush", interactive=True)
                self.edge = gr.Slider(0, 0.2, 0.0, step=0.01, label="Soft edge", min_width=140, elem_id="edge")
            with gr.Row(equal_height=True):
                gr.Checkbox(False, label="Erase", container=False, min_width=80, elem_id="erase", interactive=True)
                self.use = gr.Button("Use this region", size="sm", variant="primary", min_width=100, elem_id="paint-use")
                self.empty = gr.Button("Start empty", size="sm", min_width=90, elem_id="paint-empty")
                self.back = gr.Button("Back to the picture", size="sm", min_width=100, elem_id="paint-back")

    def connect(self, opens: Any) -> None:
        """Connect it. `opens` is the button that opens it; a card that is switched to painted does so, too."""
        page, stage = self.page, self.stage
        panels = [self.sheet, self.which, stage.status]

        @errors_to(stage.status)
        def opened(
            request: gr.Request, visitor: str, name: str | None, shown: str, cards: list[MixerCard],
            masks: dict[str, str], *now: Any,
        ) -> Values:  # fmt: skip
            """Lay a sheet with a LoRA's present region over the picture."""
            text, width, height = now
            names = [card["name"] for card in cards]
            if not names:
                raise ValueError("add a LoRA first: a region is where one acts")
            name = name if name is not None and name in names else names[0]
            picture = next((each for each in page.visits.drawn(request, visitor) if each.path.name == shown), None)
            path = picture.path if picture else page.actions.gallery.folder / shown if shown else None
            size = picture_size(path) or page.actions.size_of(Recipe(text, width=width or 0, height=height or 0))
            tags = parse_named(text, page.actions.studio.catalog.loras).tags
            laid = sheet(name, size, current_region(tags, name, masks, picture), shades(cards)[name])
            return {self.sheet: laid, self.which: gr.update(choices=names, value=name)}

        def by_card(request: gr.Request, visitor: str, asked: Any, *given: Any) -> Values:
            return opened(request, visitor, asked[0], *given)

        @errors_to(stage.status)
        def used(name: str | None, painted: str, edge: float, masks: dict[str, str], *now: Any) -> Values:
            if not name:
                raise ValueError("choose the LoRA whose region this is")
            found = {**masks, name: mask_text(painted_mask(painted, edge))}
            said = f"**{markdown(name)}** acts in what you painted, from the next picture on"
            shown = {page.form.masks: found, stage.status: said, self.sheet: ""}
            return page.prompt.edited([name], *now, region=PAINTED) | shown

        sizes = [page.form.controls[name] for name in ("width", "height")]
        given = [page.showing, page.prompt.cards, page.form.masks, page.prompt.text, *sizes]
        visitor = page.visits.visitor
        opens.click(opened, [visitor, self.which, *given], panels)
        page.prompt.to_paint.change(by_card, [visitor, page.prompt.to_paint, *given], panels)
        self.which.select(opened, [visitor, self.which, *given], panels, trigger_mode="always_last")
        self.empty.click(None, js=EMPTY)
        self.back.click(lambda: "", None, self.sheet)
        taken = [page.form.masks, *page.prompt.written, page.prompt.shown, self.sheet, stage.status]
        sent = [self.which, self.painted, self.edge, page.form.masks, *page.prompt.written]
        self.use.click(used, sent, taken, js=SENT, **ORDERED)


def picture_size(path: Any) -> tuple[int, int] | None:
    """The size in pixels of a picture file; None if there is none."""
    if path is None or not path.exists():
        return None
    with Image.open(path) as image:
        return image.size


def sheet(name: str, size: tuple[int, int], region: Image.Image | None, colour: str) -> str:
    """A sheet (HTML) for a picture of a size, with a region in grey as paint in a colour."""
    width, height = fitted(*size, SHEET)
    paint = Image.new("RGB", region.size if region else (1, 1), ImageColor.getrgb(colour)[:3])
    paint.putalpha(region or 0)
    file = BytesIO()
    paint.save(file, "PNG")
    return (
        f'<canvas id="sheet" class="sheet" width="{width}" height="{height}" role="img" '
        f'aria-label="Paint where {html.escape(name)} acts" data-brush="#brush" data-erase="#erase" '
        f'data-colour="{colour}" data-paint="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"></canvas>'
    )


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


def painted_mask(sent: str, edge: float) -> Image.Image:
    """What a browser sends of a sheet -> a mask for its picture: white where there is paint, grey where there is less of it.

    Args:
        edge: width of the soft edge, as a share of the longer side.

    Raises ValueError if nothing is painted, and for what is no mask.
    """
    mask = read_mask(sent)
    if mask.getbbox() is None:
        raise ValueError("nothing is painted: draw where the LoRA acts, then use it")
    mask = mask.resize(fitted(*mask.size, MASK_SIDE), Image.Resampling.BOX)
    return mask.filter(ImageFilter.GaussianBlur(edge * MASK_SIDE / 2)) if edge else mask


def fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """The size with the same proportions whose longer side is `side`."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
