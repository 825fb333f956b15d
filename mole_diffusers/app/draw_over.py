"""Drawing over a picture, all of it or what is painted, and once more over the result, larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops, ImageFilter

from mole_diffusers.app.page import Page
from mole_diffusers.app.paint import BRUSH, ERASER
from mole_diffusers.studio.picture_passes import on_white

LATENT = 8  # pixels of a side; of a mask one pixel for each is read, so strokes are made so much wider


def build(page: Page) -> None:
    """Lay out the panel."""
    d = page.defaults
    with gr.Accordion("Draw over a picture, or larger", open=False, elem_id="over") as page.over_panel:
        gr.Markdown("Paint what is to change in a picture, or nothing for all of it.")
        page.over = gr.ImageEditor(
            label="To draw over",
            type="pil",
            format="png",
            sources=("upload", "clipboard"),
            transforms=(),
            layers=False,
            brush=BRUSH,
            eraser=ERASER,
            buttons=[],
            elem_id="over-picture",
        )
        page.controls["strength"] = gr.Slider(
            0, 1, d.strength, step=0.05, label="Change", info="how much of the picture is drawn anew", elem_id="strength"
        )
        with gr.Row():
            page.controls["hires"] = gr.Slider(
                1, 4, d.hires, step=0.25, label="Larger", info="times; drawn over at this size", elem_id="hires"
            )
            page.controls["hires_strength"] = gr.Slider(0, 1, d.hires_strength, step=0.05, label="Change when larger")


def put(path: Path) -> tuple[Any, Any]:
    """Updates of the editor and the panel that put a picture there."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    return {"background": picture, "layers": [], "composite": picture}, gr.update(open=True)


def pictures(value: dict[str, Any] | None) -> dict[str, Image.Image]:
    """What an editor has, for `Studio.draw`: "image" and, where something is painted, "mask"; {} without a picture."""
    if value is None or value.get("background") is None:
        return {}
    image = on_white(value["background"])
    mask = Image.new("L", image.size)
    for layer in filter(None, value["layers"]):
        mask = ImageChops.lighter(mask, layer.convert("RGBA").getchannel("A").resize(image.size))
    if mask.getbbox() is None:
        return {"image": image}
    return {"image": image, "mask": mask.filter(ImageFilter.BoxBlur(LATENT // 2)).point([0, *[255] * 255])}
