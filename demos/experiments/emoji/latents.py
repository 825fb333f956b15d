"""The base's training pictures as latents: a pool that is encoded once, kept, and grows while the base trains."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from encoder import patches
from loop import WORK, save_whole, to_tensor
from random_scenes import draw_scene, is_unseen, random_caption, random_picture

from mole_diffusers.emoji import words
from mole_diffusers.emoji.drawings import Drawings
from mole_diffusers.emoji.scenes import Scene

SHAPES = {"one": 256, "wide": 128, "tall": 128, "square": 64, "broad": 128, "high": 128, "large": 96}  # pictures per chunk
CANVASES = {"broad": (96, 64), "high": (64, 96), "large": (96, 96)}  # of other shapes: one subject, or two closer together
FOLDER = WORK / "scenes"
TOUCHING, SMALL = 24, 53  # the first chunks with subjects in contact, and with small subjects


def draw_shape(shape: str, rng: np.random.Generator, k: int) -> Scene:
    """A random scene on a canvas for chunk k, from the cells that the base may see."""
    kind = rng.random() if shape in CANVASES and k >= TOUCHING else 1.0
    touches = kind < 2 / 3
    pair = touches or (kind < 0.85 and k >= SMALL)
    count = {"wide": 2, "tall": 2, "square": int(rng.integers(3, 5))}.get(shape, 1 + pair)
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


@dataclass
class Pool:
    """Latents by canvas. Chunk k has the same pictures in every run, so a resumed run reads the same ones."""

    drawings: Drawings
    latents: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {shape: [] for shape in SHAPES})
    captions: dict[str, list[list[str]]] = field(default_factory=lambda: {shape: [] for shape in SHAPES})

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

    def _encoded(self, shape: str, k: int) -> dict:
        rng = np.random.default_rng([k, list(SHAPES).index(shape)])
        scenes = [draw_shape(shape, rng, k) for _ in range(SHAPES[shape])]
        pictures = to_tensor([random_picture(self.drawings, s, rng) for s in scenes])
        captions = [random_caption(s, rng) for s in scenes]
        return {"latents": patches(self.drawings)(pictures).half(), "captions": captions}

    def batch(self, shape: str, count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """`count` random latents [count, C, H/4, W/4] in float32, with their captions."""
        chunk = torch.randint(0, len(self.latents[shape]), (count,), generator=generator).tolist()
        row = torch.randint(0, SHAPES[shape], (count,), generator=generator).tolist()
        x = torch.stack([self.latents[shape][k][i] for k, i in zip(chunk, row, strict=True)])
        return x.float(), [self.captions[shape][k][i] for k, i in zip(chunk, row, strict=True)]
