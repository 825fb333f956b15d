"""The panel for drawing over a picture, or over the part of it that is painted."""

from __future__ import annotations

from abc import ABCMeta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image, ImageFilter

from mole_app.studio import infotext
from mole_app.studio.picture_passes import on_white
from mole_app.web.style import Values, status_line
from mole_diffusers.binding import read_mask
from mole_diffusers.safe_files import read_picture

COLOUR = "#d55e00"  # of the paint
LATENT = 8  # pixels per latent


def _picture(sent: Any) -> Image.Image | None:
    """A picture that a browser has sent, as a file or as bytes."""
    if sent is None:
        return None
    with TemporaryDirectory() as folder:
        path = Path(folder, "picture")
        if isinstance(sent, bytes):
            path.write_bytes(sent)
        try:
            picture = read_picture(path if isinstance(sent, bytes) else Path(sent.path), "this", most=infotext.MAX_PIXELS)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
    return picture.convert("RGBA")


# A subclass of Gradio's picture, to browsers the same, that is read as all pictures from strangers are. For a `class` Gradio
# would write a .pyi beside this file.
Given: Any = ABCMeta.__new__(
    type(gr.Image), "Given", (gr.Image,), {"preprocess": lambda _, sent: _picture(sent), "is_template": True}
)
# What is painted on the picture. The brush, which also writes it into `OverPanel.mask`, is in `page.html`.
SHEET = f"""<canvas id="over-sheet" class="sheet" role="img" aria-label="Paint what is to change" data-brush="#over-brush"
data-erase="#over-erase" data-colour="{COLOUR}"></canvas>"""


class OverPanel:
    """The panel of a picture to draw over. Its parts are laid out (`render`) by the tab.

    Attributes:
        panel: all of it.
        picture: the picture.
        mask: what is painted on it, as `read_mask` reads it (hidden); written by the browser.
        status: a status line.
        has: whether there is a picture (hidden). The browser keeps this, but not the picture.
    """

    def __init__(self) -> None:
        self.panel = gr.Accordion("Draw over a picture, or larger", open=False, render=False, elem_id="over")
        self.picture = Given(
            label="To draw over",
            sources=["upload", "clipboard"],
            buttons=[],
            show_label=False,
            container=False,
            elem_id="over-picture",
            render=False,
        )
        self.mask = gr.Textbox("", visible="hidden", elem_id="over-mask")
        self.status = status_line(elem_id="over-status", render=False)
        self.has = gr.Checkbox(False, visible="hidden", elem_id="has-over")
        given = "(picture) => [picture !== null, '']"
        self.picture.change(None, self.picture, [self.has, self.status], js=given)

    def build_picture(self) -> None:
        """Lay out the picture, the sheet over it to paint on, and the tools for that. A picture shows the last two."""
        with gr.Column(elem_id="over-view"):
            self.picture.render()
            gr.HTML(SHEET, elem_id="over-paint", padding=False)
        with gr.Row(elem_id="over-tools", equal_height=True):
            gr.Slider(1, 25, 6, step=1, label="Brush", min_width=120, elem_id="over-brush", interactive=True)
            gr.Checkbox(False, label="Erase", container=False, min_width=80, elem_id="over-erase", interactive=True)

    def put(self, path: Path) -> Values:
        """Updates that put a picture there, and open the panel. Raises ValueError if its file is gone."""
        if not path.exists():
            raise ValueError("this picture is not in the gallery any more")
        return {self.picture: str(path), self.panel: gr.update(open=True)}


def pictures(image: Image.Image | None, painted: str) -> dict[str, Image.Image]:
    """The picture and what is painted on it for `Studio.draw`: "image" and, if something is painted, "mask"; {} without a
    picture.

    Only one pixel of a mask is read for each latent, so strokes are widened by so much.
    """
    if image is None:
        return {}
    image = on_white(image)
    mask = read_mask(painted).resize(image.size) if painted else Image.new("L", image.size)
    if mask.getbbox() is None:
        return {"image": image}
    return {"image": image, "mask": mask.filter(ImageFilter.BoxBlur(LATENT // 2)).point([0, *[255] * 255])}
