"""Each expert's region drawn over its picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps

from mole_diffusers.binding.picture_layout import Layout
from mole_diffusers.inspection.gate_figures import colours

TINT, EDGE = 0.28, 2  # opacity of a region's colour; width of its outline in pixels


def overlay(
    picture: Image.Image, layout: Layout, *, side: int = 384, shades: Mapping[str, str] | None = None
) -> Image.Image:
    """The picture, enlarged so that its longer side has `side` pixels, under the tinted regions and their names.

    Args:
        shades: name -> colour as "#rrggbb", for those that are already chosen; see `gate_figures.colours`.
    """
    shades = colours(layout.regions, shades)
    scale = side / max(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    image = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    names = []
    for name, region in layout.regions.items():
        colour = ImageColor.getrgb(shades[name])[:3]
        grey = as_grey(region).resize(size, Image.Resampling.NEAREST)
        image = Image.composite(Image.blend(image, Image.new("RGB", size, colour), TINT), image, grey)
        inside = grey.point(lambda value: 255 * (value > 127))
        core = ImageOps.crop(ImageOps.expand(inside, EDGE).filter(ImageFilter.MinFilter(2 * EDGE + 1)), EDGE)
        image.paste(colour, mask=ImageChops.subtract(inside, core))
        names += [(name, at, colour) for at in _name_places(np.asarray(inside) > 0)]
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(max(12, side // 22))
    for name, at, colour in names:
        draw.text(at, name, "white", font, anchor="ma", stroke_width=3, stroke_fill=colour)
    return image


def as_grey(region: torch.Tensor) -> Image.Image:
    """A region, the share of each place that it covers, as a grey picture."""
    return Image.fromarray((region.numpy() * 255).round().astype(np.uint8))


def _name_places(inside: np.ndarray) -> list[tuple[int, int]]:
    """(x, y) of a region's name, [H, W] bool: at its top, and once more if columns of others divide it."""
    columns = np.flatnonzero(inside.any(0))
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1) if len(columns) else []
    tops = [int(np.argmax(inside[:, run].any(1))) for run in runs]
    return [(int(run[inside[top, run]].mean()), top + 6) for run, top in zip(runs, tops, strict=True)]
