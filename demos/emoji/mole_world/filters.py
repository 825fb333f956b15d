"""Styles that are exact functions of a drawing, so that every subject has a ground truth in them.

Each takes and returns RGBA as float32 [H, W, 4] in 0..255, at the size in the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageFilter

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
Colour = tuple[int, int, int]
Filter = Callable[[np.ndarray], np.ndarray]


def _ramp(rgba: np.ndarray, stops: Sequence[Colour]) -> np.ndarray:
    """Luminance looked up on a piecewise linear ramp of colours, dark to light."""
    luma = rgba[..., :3] @ LUMA
    at = np.linspace(0, 255, len(stops))
    return np.dstack([*(np.interp(luma, at, [s[c] for s in stops]) for c in range(3)), rgba[..., 3]])


def _edges(rgba: np.ndarray) -> np.ndarray:
    """Edge strength [H, W] in 0..1: the largest step in luminance or alpha between neighbouring pixels."""
    planes = np.stack([rgba[..., :3] @ LUMA * (rgba[..., 3] / 255), rgba[..., 3]], -1)  # [H, W, 2]
    dy = np.abs(np.diff(planes, axis=0, prepend=planes[:1]))
    dx = np.abs(np.diff(planes, axis=1, prepend=planes[:, :1]))
    return np.clip(np.maximum(dx, dy).max(-1) / 90, 0, 1)


def _lines(rgba: np.ndarray, body: np.ndarray | Colour, line: Colour) -> np.ndarray:
    """Edges in one colour over `body`, which is one colour or [H, W, 3]."""
    body = np.asarray(body, np.float32)
    return np.dstack([body + (np.asarray(line) - body) * _edges(rgba)[..., None], rgba[..., 3]])


def _image(rgba: np.ndarray) -> Image.Image:
    return Image.fromarray(rgba.clip(0, 255).astype(np.uint8), "RGBA")


def negative(rgba: np.ndarray) -> np.ndarray:
    """Every colour channel inverted."""
    return np.dstack([255 - rgba[..., :3], rgba[..., 3]])


def mosaic(rgba: np.ndarray) -> np.ndarray:
    """12 x 12 tiles, each with the mean colour of its area."""
    height, width = rgba.shape[:2]
    tiles = np.array(_image(rgba).resize((12, 12), Image.Resampling.BOX))
    tiles[..., 3] = np.where(tiles[..., 3] > 90, 255, 0)
    return np.asarray(Image.fromarray(tiles, "RGBA").resize((width, height), Image.Resampling.NEAREST), np.float32)


def neon(rgba: np.ndarray) -> np.ndarray:
    """Glowing edges on near black: edges keep a saturated form of the colour around them."""
    rgb = rgba[..., :3]
    vivid = np.clip((rgb - rgb.min(-1, keepdims=True)) * 2.2 + 60, 0, 255)
    return np.dstack([18 + (vivid - 18) * _edges(rgba)[..., None], rgba[..., 3]])


def outline(rgba: np.ndarray) -> np.ndarray:
    """A thick black line around the drawing, as on a sticker."""
    alpha = np.asarray(Image.fromarray(rgba[..., 3].astype(np.uint8)).filter(ImageFilter.MaxFilter(5)), np.float32)
    return np.dstack([rgba[..., :3] * (rgba[..., 3:] / 255), alpha])


def pastel(rgba: np.ndarray) -> np.ndarray:
    """Pale colours: halfway to a warm white."""
    return np.dstack([rgba[..., :3] * 0.5 + np.array([115, 105, 120]), rgba[..., 3]])


def poster(rgba: np.ndarray) -> np.ndarray:
    """Three flat steps per colour channel, as in cheap print."""
    return np.dstack([np.round(rgba[..., :3] / 127.5) * 127.5, rgba[..., 3]])


def watercolour(rgba: np.ndarray) -> np.ndarray:
    """Running colours: softened, washed out, darker at the rim."""
    soft = np.asarray(_image(rgba).filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    wet = soft[..., :3] * 0.62 + 92
    rim = np.clip(1 - np.abs(soft[..., 3] - 140) / 110, 0, 1)[..., None]
    return np.dstack([wet * (1 - 0.4 * rim), np.clip(soft[..., 3] * 1.15, 0, 255)])


def chalk(rgba: np.ndarray) -> np.ndarray:
    """Edges in chalk on a dark green board, with a faint wash of the drawing's own colours."""
    return _lines(rgba, np.array([28, 62, 50]) + 0.3 * rgba[..., :3], (245, 245, 235))


def relief(rgba: np.ndarray) -> np.ndarray:
    """Carved in pale stone, lit from the upper left."""
    height = rgba[..., :3] @ LUMA * (rgba[..., 3] / 255)
    slope = height - np.roll(height, (1, 1), (0, 1))  # against the pixel up and to the left
    return np.dstack([*(np.clip(tone - 0.9 * slope, 0, 255) for tone in (176, 164, 144)), rgba[..., 3]])


def aurora(rgba: np.ndarray) -> np.ndarray:
    """Northern lights: from green at the top to violet at the bottom, as bright as the drawing."""
    down = np.linspace(0, 1, len(rgba))[:, None, None]
    hue = (1 - down) * np.array([90, 255, 170]) + down * np.array([190, 70, 255])  # [H, 1, 3]
    light = 0.25 + 0.85 * (rgba[..., :3] @ LUMA)[..., None] / 255
    return np.dstack([np.clip(hue * light, 0, 255), rgba[..., 3]])


RAMPS: dict[str, tuple[Colour, ...]] = {  # colours for luminance, from dark to light
    "sepia": ((40, 22, 8), (150, 100, 55), (250, 232, 195)),
    "emerald": ((0, 45, 40), (20, 150, 95), (215, 255, 205)),
    "violet": ((235, 220, 255), (150, 110, 220), (45, 15, 95)),  # light where the drawing is dark
    "duotone": ((50, 10, 110), (255, 160, 40)),  # two printing inks
    "thermal": ((10, 10, 140), (190, 20, 170), (250, 70, 30), (255, 245, 90)),  # a heat camera's palette
}
LINES: dict[str, tuple[Colour, Colour]] = {  # colours of the paper and of the edges on it
    "sketch": ((222, 222, 214), (50, 50, 60)),
    "blueprint": ((25, 70, 160), (225, 240, 255)),
}
FILTERS: dict[str, Filter] = {
    **{f.__name__: f for f in (negative, mosaic, neon, outline, pastel, poster, watercolour, chalk, relief, aurora)},
    **{name: partial(_ramp, stops=stops) for name, stops in RAMPS.items()},
    **{name: partial(_lines, body=body, line=line) for name, (body, line) in LINES.items()},
}
