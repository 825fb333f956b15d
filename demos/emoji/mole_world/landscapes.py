"""What stands behind the subjects of a scene: a landscape with one horizon, and the one light of the whole picture.

Pictures here are float32 [H, W, 3] in 0..255.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
LINES_PER_PIXEL = 4  # outlines are drawn this much larger, then scaled down, so that they are smooth

OPEN_SKIES: tuple[tuple[Colour, Colour], ...] = (  # at the top, and at the horizon
    ((110, 165, 235), (205, 228, 250)),
    ((140, 200, 240), (235, 245, 250)),
    ((170, 160, 225), (240, 215, 235)),
    ((245, 190, 150), (252, 232, 200)),
    ((165, 215, 205), (232, 246, 232)),
    ((180, 190, 205), (226, 230, 236)),
)
OPEN_GROUNDS: tuple[Colour, ...] = (
    (120, 185, 95), (165, 200, 105), (205, 180, 120), (170, 135, 100), (150, 165, 150), (225, 205, 160),
)  # fmt: skip


@dataclass(frozen=True)
class Light:
    """The light of a picture: a factor for each colour channel, and the sky if the landscape does not say another."""

    tint: tuple[float, float, float]
    sky: tuple[Colour, Colour] | None = None


LIGHTS = {
    "day": Light((1.0, 1.0, 1.0)),
    "sunset": Light((1.0, 0.86, 0.74), ((240, 150, 130), (255, 228, 160))),
    "night": Light((0.66, 0.72, 0.95), ((40, 50, 110), (110, 125, 190))),
}


@dataclass(frozen=True)
class Frame:
    """Where a landscape's parts are.

    Attributes:
        horizon: [W], the height of the ground's edge, in pixels from the top.
        far: the height of the farthest point of the ground, in pixels from the top: where a flat horizon would be.
    """

    width: int
    height: int
    horizon: np.ndarray
    far: float


def landscape(kind: str, light: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A landscape [H, W, 3] before its light is laid over it, see `lit`.

    Args:
        kind: one of LANDSCAPES.
        light: one of LIGHTS; it decides the sky.
        size: width and height in pixels.
    """
    return LANDSCAPES[kind](light, size, rng)


def lit(picture: np.ndarray, light: str) -> np.ndarray:
    """The whole picture, subjects too, in this light."""
    return picture * np.asarray(LIGHTS[light].tint, np.float32)


def _frame(size: tuple[int, int], rng: np.random.Generator, swing: float = 0.06) -> Frame:
    """One gentle line across the whole picture, between .42 and .72 of its height."""
    width, height = size
    far = height * rng.uniform(0.42, 0.72)
    x = np.arange(width) / 64  # waves are as long on every canvas
    waves = np.sin(2 * np.pi * (x / rng.uniform(1.2, 2.4) + rng.random()))
    return Frame(width, height, far + swing * min(size) * waves, far)


def _sky(frame: Frame, colours: tuple[Colour, Colour], light: str) -> np.ndarray:
    top, low = (np.asarray(c, np.float32) for c in LIGHTS[light].sky or colours)
    down = np.clip(np.arange(frame.height) / max(frame.far, 1), 0, 1)[:, None, None]
    return np.broadcast_to(top + (low - top) * down, (frame.height, frame.width, 3)).copy()


def _lay(picture: np.ndarray, edge: np.ndarray, colour: Colour, deeper: float = 0.82) -> None:
    """Paint everything below `edge` [W] in a colour that gets darker towards the bottom, with a smooth edge."""
    height = len(picture)
    y = np.arange(height)[:, None]
    cover = np.clip(y - edge[None] + 0.5, 0, 1)[..., None]
    down = np.clip((y - edge[None]) / max(height - float(edge.min()), 1), 0, 1)[..., None]
    painted = np.asarray(colour, np.float32) * (1 + (deeper - 1) * down)
    picture[:] = picture + (painted - picture) * cover


def _paint(picture: np.ndarray, draw: Callable[[ImageDraw.ImageDraw, int], None]) -> None:
    """Draw outlines over the picture: `draw(canvas, scale)` draws on one that is `scale` times as large."""
    height, width = picture.shape[:2]
    large = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).resize(
        (width * LINES_PER_PIXEL, height * LINES_PER_PIXEL), Image.Resampling.BILINEAR
    )
    draw(ImageDraw.Draw(large), LINES_PER_PIXEL)
    picture[:] = np.asarray(large.resize((width, height), Image.Resampling.BOX), np.float32)


def _meadow(light: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Where a caption leaves the scene open: any sky over any ground, with one hill line."""
    frame = _frame(size, rng)
    picture = _sky(frame, OPEN_SKIES[rng.integers(len(OPEN_SKIES))], light)
    _lay(picture, frame.horizon, OPEN_GROUNDS[rng.integers(len(OPEN_GROUNDS))])
    return picture


def _beach(light: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    frame = _frame(size, rng, swing=0)
    picture = _sky(frame, ((120, 190, 245), (215, 238, 250)), light)
    _lay(picture, frame.horizon, (50, 130, 195), deeper=1.15)
    shore = frame.far + frame.height * rng.uniform(0.10, 0.18)
    wave = shore + 1.5 * np.sin(2 * np.pi * (np.arange(frame.width) / rng.uniform(28, 44) + rng.random()))
    _lay(picture, wave - 2, (235, 245, 248), deeper=1)
    _lay(picture, wave, (240, 215, 150), deeper=0.9)
    return picture


def _forest(light: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    frame = _frame(size, rng, swing=0.03)
    picture = _sky(frame, ((170, 215, 235), (225, 240, 225)), light)
    rows = []
    for colour, tall in (((95, 150, 115), 0.40), ((50, 110, 75), 0.26)):
        start = rng.uniform(-8, 0)
        tops = [(x, frame.height * tall * rng.uniform(0.8, 1.1)) for x in np.arange(start, frame.width + 10, 10)]
        rows.append((colour, tops))

    def trees(canvas: ImageDraw.ImageDraw, scale: int) -> None:
        for colour, tops in rows:
            for x, high in tops:
                corners = [(x - 7, frame.far + 6), (x, frame.far - high), (x + 7, frame.far + 6)]
                canvas.polygon([(a * scale, b * scale) for a, b in corners], fill=colour)

    _paint(picture, trees)
    _lay(picture, frame.horizon, (85, 130, 65))
    return picture


def _snow(light: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    frame = _frame(size, rng)
    picture = _sky(frame, ((150, 175, 215), (215, 225, 240)), light)
    _lay(picture, frame.horizon - frame.height * 0.10, (205, 216, 234), deeper=1)
    _lay(picture, frame.horizon, (244, 248, 253), deeper=0.93)
    flakes = rng.uniform(0, 1, (frame.width * frame.height // 260, 2)) * [frame.width, frame.height]

    def falling(canvas: ImageDraw.ImageDraw, scale: int) -> None:
        for x, y in flakes * scale:
            canvas.ellipse((x - scale, y - scale, x + scale, y + scale), fill=(255, 255, 255))

    _paint(picture, falling)
    return picture


def _city(light: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    frame = _frame(size, rng, swing=0)
    picture = _sky(frame, ((140, 180, 220), (225, 230, 235)), light)
    houses, x = [], rng.uniform(-10, 0)
    while x < frame.width:
        wide = rng.uniform(11, 17)
        houses.append((x, wide, frame.height * rng.uniform(0.18, 0.42), int(rng.integers(3))))
        x += wide + 1

    def skyline(canvas: ImageDraw.ImageDraw, scale: int) -> None:
        for left, wide, high, shade in houses:
            top, tone = frame.far - high, ((120, 125, 145), (145, 135, 140), (100, 112, 130))[shade]
            canvas.rectangle([v * scale for v in (left, top, left + wide, frame.far + 2)], fill=tone)
            for y in np.arange(top + 3, frame.far - 3, 5):
                for a in np.arange(left + 2.5, left + wide - 3, 4.5):
                    canvas.rectangle([v * scale for v in (a, y, a + 2, y + 2.2)], fill=(250, 225, 140))

    _paint(picture, skyline)
    _lay(picture, frame.horizon, (128, 128, 134), deeper=0.85)
    _lay(picture, frame.horizon + frame.height * 0.08, (96, 98, 106), deeper=0.9)
    return picture


def _desert(light: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    frame = _frame(size, rng, swing=0.09)
    picture = _sky(frame, ((110, 175, 225), (250, 235, 205)), light)
    x = np.arange(frame.width) / 64
    behind = 0.07 * frame.height * np.sin(2 * np.pi * (x / rng.uniform(0.9, 1.5) + rng.random()))
    _lay(picture, frame.far - 0.04 * frame.height + behind, (225, 165, 95), deeper=1)
    _lay(picture, frame.horizon + 0.05 * frame.height, (240, 190, 110), deeper=0.88)
    return picture


def _mountains(light: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    frame = _frame(size, rng, swing=0.03)
    picture = _sky(frame, ((115, 165, 225), (220, 232, 245)), light)
    x, peaks = rng.uniform(-12, 6), []
    while x < frame.width + 12:
        peaks.append((x, frame.height * rng.uniform(0.28, 0.42)))
        x += rng.uniform(22, 32)

    def rocks(canvas: ImageDraw.ImageDraw, scale: int) -> None:
        for at, high in peaks:
            top, foot, half = frame.far - high, frame.far + 4, high * 0.85
            snowy = [(at - half * 0.3, top + high * 0.3), (at, top), (at + half * 0.3, top + high * 0.3)]
            for corners, colour in (
                ([(at - half, foot), (at, top), (at + half, foot)], (125, 130, 150)),
                (snowy, (240, 244, 250)),
            ):
                canvas.polygon([(a * scale, b * scale) for a, b in corners], fill=colour)

    _paint(picture, rocks)
    _lay(picture, frame.horizon, (130, 175, 95))
    return picture


LANDSCAPES: dict[str, Callable[[str, tuple[int, int], np.random.Generator], np.ndarray]] = {
    "open": _meadow,
    "beach": _beach,
    "forest": _forest,
    "snow": _snow,
    "city": _city,
    "desert": _desert,
    "mountains": _mountains,
}
