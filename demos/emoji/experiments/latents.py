"""The base's training pictures as latents: a pool that is encoded once, kept, and grows while the base trains."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from encoder import patches
from loop import WORK, save_whole, to_tensor
from random_scenes import draw_scene, is_unseen, random_caption, random_layout

from mole_world import words
from mole_world.drawings import Drawings
from mole_world.scenes import CONTACTS, Box, Scene

SHAPES = {"one": 256, "wide": 128, "tall": 128, "square": 64, "broad": 128, "high": 128, "large": 96}  # pictures per chunk
CANVASES = {"broad": (96, 64), "high": (64, 96), "large": (96, 96)}  # of other shapes: one subject, or two closer together
FOLDER = WORK / "scenes"


def draw_shape(shape: str, rng: np.random.Generator) -> Scene:
    """A random scene on a canvas, from the cells that the base may see."""
    kind = rng.random() if shape in CANVASES else 1.0
    touches, pair = kind < 2 / 3, kind < 0.85
    count = {"wide": 2, "tall": 2, "square": 3 + int(rng.random() < 0.2)}.get(shape, 1 + pair)
    while True:
        scene = draw_scene(
            words.BASE_SUBJECTS,
            words.BASE_STYLES,
            rng,
            count=count,
            allowed=lambda s, y: not is_unseen(s, y),
            placed=0.4,  # places help tell subjects apart
            touching=float(touches),
        )
        width, height = scene.size
        if shape in CANVASES:
            if pair and shape != "large" and (width > height) != (shape == "broad"):
                continue
            return replace(scene, canvas=CANVASES[shape])
        if {"wide": width > height, "tall": height > width}.get(shape, True):
            return scene


Placed = list[tuple[str, Box]]  # the subjects of a picture and their boxes, from back to front


def back_to_front(scene: Scene, boxes: list[Box]) -> Placed:
    placed = list(zip(scene.subjects, boxes, strict=True))
    return placed[::-1] if CONTACTS.get(scene.relation) == 0 else placed


@dataclass
class Pool:
    """Latents by canvas. Chunk k has the same pictures in every run, so a resumed run reads the same ones."""

    drawings: Drawings
    latents: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {shape: [] for shape in SHAPES})
    captions: dict[str, list[list[str]]] = field(default_factory=lambda: {shape: [] for shape in SHAPES})
    placed: dict[str, list[list[Placed]]] = field(default_factory=lambda: {shape: [] for shape in SHAPES})

    def grow(self, chunks: int, shapes: Iterable[str] = SHAPES) -> None:
        """Grow to `chunks` chunks of each of these canvases."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        for shape in shapes:
            for k in range(len(self.latents[shape]), chunks):
                path = FOLDER / f"{shape}_{k:03d}.pt"
                if not path.exists():
                    save_whole(self._encoded(shape, k), path)
                chunk = torch.load(path, weights_only=True)
                self.latents[shape].append(chunk["latents"])
                self.captions[shape].append(chunk["captions"])
                self.placed[shape].append(chunk["placed"])

    def _encoded(self, shape: str, k: int) -> dict:
        rng = np.random.default_rng([k, list(SHAPES).index(shape)])
        scenes = [draw_shape(shape, rng) for _ in range(SHAPES[shape])]
        layouts = [random_layout(self.drawings, s, rng) for s in scenes]
        captions = [random_caption(s, rng) for s in scenes]
        placed = [back_to_front(scene, boxes) for scene, boxes, _ in layouts]
        pictures = to_tensor([self.drawings.picture(scene, boxes, seed=seed) for scene, boxes, seed in layouts])
        return {"latents": patches(self.drawings)(pictures).half(), "captions": captions, "placed": placed}

    def batch(self, shape: str, count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str], list[Placed]]:
        """`count` random latents [count, C, H/4, W/4] in float32, with their captions and the boxes of their subjects."""
        chunk = torch.randint(0, len(self.latents[shape]), (count,), generator=generator).tolist()
        row = torch.randint(0, SHAPES[shape], (count,), generator=generator).tolist()
        rows = list(zip(chunk, row, strict=True))
        x = torch.stack([self.latents[shape][k][i] for k, i in rows])
        return x.float(), [self.captions[shape][k][i] for k, i in rows], [self.placed[shape][k][i] for k, i in rows]
