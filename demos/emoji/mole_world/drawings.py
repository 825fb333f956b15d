"""The artists' drawings, and pictures made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mole_world.filters import FILTERS
from mole_world.landscapes import landscape, lit
from mole_world.scenes import CONTACTS, SIDE, Box, Scene, in_contact, places
from mole_world.words import BACKGROUNDS

COVERED = 0.1  # of two outlines in contact, the least share of the smaller one that is in both


class Drawings:
    """Every subject in every style, and pictures of scenes. `folder` contains atlas.webp and atlas.json."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.layout = json.loads((folder / "atlas.json").read_text())

    @cached_property
    def _atlas(self) -> Image.Image:
        return Image.open(self.folder / "atlas.webp").convert("RGBA")

    def drawing(self, subject: str, style: str, size: int = SIDE) -> Image.Image:
        """`subject` in `style`, size x size RGBA. Raises KeyError that names what is missing."""
        if style in FILTERS:
            rgba = np.asarray(self.drawing(subject, "noto", size), np.float32)
            return Image.fromarray(FILTERS[style](rgba).clip(0, 255).astype(np.uint8), "RGBA")
        subjects, styles, cell = self.layout["subjects"], self.layout["styles"], self.layout["size"]
        if subject not in subjects or style not in styles:
            raise KeyError(f"no drawing of {subject!r} in {style!r}; styles: {[*styles, *FILTERS]}")
        row, column = divmod(subjects.index(subject) * len(styles) + styles.index(style), self.layout["columns"])
        x, y = column * cell, row * cell
        return self._atlas.crop((x, y, x + cell, y + cell)).resize((size, size), Image.Resampling.HAMMING)

    def picture(self, scene: Scene, boxes: Sequence[Box] = (), *, seed: int = 0) -> Image.Image:
        """The scene as RGB, `scene.size` large.

        Args:
            boxes: a box for each subject; by default they come from `places` or `touching`. The last one named is drawn
                first, unless the relation says who is in front.
            seed: of what the scene leaves open about its landscape. An open light is day.
        """
        light = scene.light or "day"
        if scene.background in BACKGROUNDS:
            canvas = Image.new("RGB", scene.size, BACKGROUNDS[scene.background])
        else:
            canvas = _image(landscape(scene.background, light, scene.size, np.random.default_rng(seed)))
        if not boxes:
            boxes = self.touching(scene) if scene.relation in CONTACTS else places(scene)
        placed = list(zip(scene.subjects, boxes, strict=True))
        in_front = CONTACTS.get(scene.relation or "", 0)
        for subject, (size, x, y) in placed[::-1] if in_front == 0 else placed:
            drawing = self.drawing(subject, scene.style, size)
            canvas.paste(drawing, (x, y), drawing)
        return canvas if light == "day" else _image(lit(np.asarray(canvas, np.float32), light))

    def touching(self, scene: Scene, size: int = 54, hidden: float = 0.3, mirrored: bool = False) -> list[Box]:
        """The boxes of two subjects in contact: nearer than in `in_contact` if their outlines overlap too little there."""
        while True:
            boxes = in_contact(scene, size, hidden, mirrored)
            first, second = (self._outline(s, scene, box) for s, box in zip(scene.subjects, boxes, strict=True))
            if (first & second).sum() >= COVERED * min(first.sum(), second.sum()) or hidden > 0.7:
                return boxes
            hidden += 0.06

    def _outline(self, subject: str, scene: Scene, box: Box) -> np.ndarray:
        """[H, W] bool: where a subject covers the canvas."""
        size, x, y = box
        canvas = Image.new("L", scene.size)
        canvas.paste(self.drawing(subject, scene.style, size).getchannel("A"), (x, y))
        return np.asarray(canvas) > 230


def _image(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def default_folder() -> Path:
    """The folder of the world's files."""
    return Path(__file__).parent / "assets"
