"""The editor for drawing over a picture, or over the part of it that is painted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops, ImageFilter

from mole_diffusers.studio.picture_passes import on_white

COLOUR, OPACITY = (213, 94, 0), 153  # of the paint; the opacity is out of 255, so the picture shows through
BRUSH = gr.Brush(60, [f"rgba({', '.join(map(str, COLOUR))}, {OPACITY / 255})"], color_mode="fixed")
editor: Any = partial(
    gr.ImageEditor, type="pil", format="png", transforms=(), layers=False, brush=BRUSH, eraser=gr.Eraser(60), buttons=[]
)
LATENT = 8  # pixels per latent; only one mask pixel is read for each, so strokes are widened by this much


def put(path: Path) -> dict[str, Any]:
    """A value for the editor: the picture in a file, without paint."""
    picture = Image.open(path).convert("RGB")
    return {"background": picture, "layers": [], "composite": picture}


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
