"""The editor for drawing over a picture, or over the part of it that is painted."""

from __future__ import annotations

from abc import ABCMeta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image, ImageChops, ImageFilter

from mole_diffusers.app.style import Values, status_line
from mole_diffusers.lora.safe_files import read_picture
from mole_diffusers.studio import infotext
from mole_diffusers.studio.picture_passes import on_white

COLOUR, OPACITY = (213, 94, 0), 153  # of the paint; the opacity is out of 255, so the picture shows through
LATENT = 8  # pixels per latent; only one mask pixel is read for each, so strokes are widened by this much


def _read(self: gr.ImageEditor, payload: Any) -> dict[str, Any] | None:
    """What a browser has sent, read as every picture from a stranger is: the background and at most one layer of paint.

    The composite of both is not read.
    """
    if payload is not None and payload.id is not None:
        payload = self.blob_storage.pop(payload.id, None)
    if payload is None:
        return None
    layers = [layer for layer in payload.layers if layer is not None]
    if len(layers) > 1:
        raise gr.Error(f"the editor has one layer of paint, got {len(layers)}", print_exception=False)
    background, *layers = map(_picture, (payload.background, *layers))
    return {"background": background, "layers": layers, "composite": None}


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


# A subclass of Gradio's editor, to browsers the same. For a `class` Gradio would write a .pyi beside this file.
Editor: Any = ABCMeta.__new__(type(gr.ImageEditor), "Editor", (gr.ImageEditor,), {"preprocess": _read, "is_template": True})
BRUSH = gr.Brush(60, [f"rgba({', '.join(map(str, COLOUR))}, {OPACITY / 255})"], color_mode="fixed")
# A picture that is read in the same way.
Given: Any = ABCMeta.__new__(
    type(gr.Image), "Given", (gr.Image,), {"preprocess": lambda _, sent: _picture(sent), "is_template": True}
)
editor: Any = partial(
    Editor, type="pil", format="png", transforms=(), layers=False, brush=BRUSH, eraser=gr.Eraser(60), buttons=[]
)


class OverPanel:
    """The panel of a picture to draw over. Its parts are laid out (`render`) by the tab.

    Attributes:
        panel: all of it.
        editor: the picture, and what is painted on it.
        status: a status line.
        has: whether a picture is in the editor (hidden). The browser keeps this, but not the picture.
    """

    def __init__(self) -> None:
        self.panel = gr.Accordion("Draw over a picture, or larger", open=False, render=False, elem_id="over")
        sources = ("upload", "clipboard")
        self.editor = editor(label="To draw over", sources=sources, elem_id="over-picture", render=False)
        self.status = status_line(elem_id="over-status", render=False)
        self.has = gr.Checkbox(False, visible="hidden", elem_id="has-over")
        self.editor.upload(None, None, [self.has, self.status], js="() => [true, '']")
        self.editor.clear(None, None, self.has, js="() => false")

    def put(self, path: Path) -> Values:
        """Updates that put a picture into the editor, and open the panel. Raises ValueError if its file is gone."""
        if not path.exists():
            raise ValueError("this picture is not in the gallery any more")
        picture = Image.open(path).convert("RGB")
        value = {"background": picture, "layers": [], "composite": picture}
        return {self.editor: value, self.panel: gr.update(open=True)}


def paint(value: dict[str, Any]) -> Image.Image:
    """The paint in an editor with a picture, as a grey picture of the same size; black where nothing is painted."""
    found = Image.new("L", value["background"].size)
    for layer in filter(None, value["layers"]):
        found = ImageChops.lighter(found, layer.convert("RGBA").getchannel("A").resize(found.size))
    return found


def pictures(value: dict[str, Any] | None) -> dict[str, Image.Image]:
    """The editor's pictures for `Studio.draw`: "image" and, if something is painted, "mask"; {} without a picture."""
    if value is None or value.get("background") is None:
        return {}
    image, mask = on_white(value["background"]), paint(value)
    if mask.getbbox() is None:
        return {"image": image}
    return {"image": image, "mask": mask.filter(ImageFilter.BoxBlur(LATENT // 2)).point([0, *[255] * 255])}
