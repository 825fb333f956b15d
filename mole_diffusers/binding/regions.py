"""Regions that a user gives: names, boxes and masks, as the share of each place that lies inside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

ShareBox = tuple[float, float, float, float]
Region = str | ShareBox | Image.Image
GridSize = tuple[int, int]  # height and width of a picture, in latent pixels or in tokens of a layer

AUTO, EVERYWHERE = "auto", "everywhere"
BOXES: dict[str, ShareBox] = {  # left, top, right, bottom, in shares of width and height
    "left": (0, 0, 0.5, 1), "right": (0.5, 0, 1, 1), "top": (0, 0, 1, 0.5), "bottom": (0, 0.5, 1, 1),
    "center": (0.25, 0.25, 0.75, 0.75), "top left": (0, 0, 0.5, 0.5), "top right": (0.5, 0, 1, 0.5),
    "bottom left": (0, 0.5, 0.5, 1), "bottom right": (0.5, 0.5, 1, 1),
}  # fmt: skip
KNOWN = (
    f"{AUTO!r}, {EVERYWHERE!r}, {', '.join(map(repr, BOXES))}, a box (left, top, right, bottom) in 0..1, or a mask picture"
)


def checked_region(region: Region, whose: str) -> Region:
    """The region, with boxes as tuples of floats. Raises ValueError that lists what a region can be."""
    if isinstance(region, Image.Image):
        if region.mode in ("I", "F"):  # no number is defined as white
            raise ValueError(f"the region of {whose!r} is a picture of mode {region.mode!r}; make it one of mode 'L'")
        return region
    if isinstance(region, str):
        if region in (AUTO, EVERYWHERE, *BOXES):
            return region
    elif isinstance(region, Sequence) and len(region) == 4 and all(isinstance(v, int | float) for v in region):
        left, top, right, bottom = map(float, region)
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return left, top, right, bottom
    raise ValueError(f"the region of {whose!r} is {region!r}; a region is {KNOWN}")


def region_mask(region: Region, height: int, width: int) -> torch.Tensor:
    """[height, width] in 0..1: how much of each place lies inside a named region, a box or a mask picture."""
    if isinstance(region, Image.Image):
        grey = Image.fromarray(_white(region)).resize((width, height), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(grey, np.float32).copy())
    left, top, right, bottom = BOXES[region] if isinstance(region, str) else region
    return _covered(top, bottom, height)[:, None] * _covered(left, right, width)


def region_picture(mask: Image.Image) -> Image.Image:
    """A mask picture in plain grey of 8 bits. Transparent pixels are black."""
    return Image.fromarray((_white(mask) * 255).round().astype(np.uint8))


def _white(mask: Image.Image) -> np.ndarray:
    """How white each pixel of a mask is, [H, W] float32 in 0..1. Transparent pixels are black."""
    if mask.mode.startswith("I"):
        return np.asarray(mask, np.float32) / 65535
    if "A" in mask.getbands() or "transparency" in mask.info:
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
    return np.asarray(mask.convert("L"), np.float32) / 255


def _covered(low: float, high: float, places: int) -> torch.Tensor:
    """[places]: how much of each of `places` equal parts of 0..1 lies between `low` and `high`."""
    edges = torch.arange(places + 1.0)
    return (edges[1:].clamp(max=high * places) - edges[:-1].clamp(min=low * places)).clamp(min=0)
