"""What an editor holds, for drawing over a picture, all of it or what is painted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops, ImageFilter

from mole_diffusers.studio.picture_passes import on_white

COLOUR, OPACITY = (213, 94, 0), 153  # of the paint; of 255: the picture is seen through it
BRUSH = gr.Brush(60, [f"rgba({', '.join(map(str, COLOUR))}, {OPACITY / 255})"], color_mode="fixed")
editor: Any = partial(
    gr.ImageEditor, type="pil", format="png", transforms=(), layers=False, brush=BRUSH, eraser=gr.Eraser(60), buttons=[]
)
LATENT = 8  # pixels of a side; of a mask one pixel for each is read, so strokes are made so much wider


def put(path: Path) -> dict[str, Any]:
    """A value for an editor: the picture of a file, and no paint."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    return {"background": picture, "layers": [], "composite": picture}


def paint(value: dict[str, Any]) -> Image.Image:
    """What is painted in an editor that has a picture, of its size, in grey; black where there is nothing."""
    found = Image.new("L", value["background"].size)
    for layer in filter(None, value["layers"]):
        found = ImageChops.lighter(found, layer.convert("RGBA").getchannel("A").resize(found.size))
    return found


def pictures(value: dict[str, Any] | None) -> dict[str, Image.Image]:
    """What an editor has, for `Studio.draw`: "image" and, where something is painted, "mask"; {} without a picture."""
    if value is None or value.get("background") is None:
        return {}
    image, mask = on_white(value["background"]), paint(value)
    if mask.getbbox() is None:
        return {"image": image}
    return {"image": image, "mask": mask.filter(ImageFilter.BoxBlur(LATENT // 2)).point([0, *[255] * 255])}
