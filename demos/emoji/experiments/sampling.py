"""Draw pictures with a pipeline, and count shares of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from loop import mixed_precision, small_attention
from PIL import Image

from mole_world.evaluation.statistics import wilson
from mole_world.scenes import Scene

STEPS, GUIDANCE, BATCH = 20, 3.0, 16


def generate(
    pipe, scenes: Sequence[Scene], captions: Sequence[str] = (), *, seed: int = 0, steps: int = STEPS
) -> list[Image.Image]:
    """A picture of each scene on its own canvas, in order. Picture i has the noise of seed + i.

    Args:
        captions: a caption for each scene; by default its own.
    """
    captions = captions or [scene.caption for scene in scenes]
    out: dict[int, Image.Image] = {}
    for size in sorted({s.size for s in scenes}):
        of_size = [i for i, s in enumerate(scenes) if s.size == size]
        for start in range(0, len(of_size), BATCH):
            rows = of_size[start : start + BATCH]
            with small_attention(), mixed_precision():
                found = pipe(
                    [captions[i] for i in rows],
                    width=size[0],
                    height=size[1],
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE,
                    generator=[torch.Generator().manual_seed(seed + i) for i in rows],
                ).images
            out |= dict(zip(rows, found, strict=True))
    return [out[i] for i in range(len(scenes))]


@dataclass(frozen=True)
class Share:
    """`hits` out of `count` pictures, with Wilson's 95 % interval."""

    hits: int
    count: int

    @property
    def share(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.share, self.count)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.2f} [{low:.2f}, {high:.2f}] of {self.count}"


def sheet(scenes: Sequence[Scene], rows: Sequence[Sequence[Image.Image]], *, columns: int, scale: int = 2) -> Image.Image:
    """A contact sheet with a column per scene and a picture of each of `rows`, such as a sample above its true drawing."""
    cell = max(max(s.size) for s in scenes) * scale + 4
    bands = -(-len(scenes) // columns)
    page = Image.new("RGB", (columns * cell, bands * cell * len(rows)), "white")
    for k, pictures in enumerate(rows):
        for i, picture in enumerate(pictures):
            big = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)
            page.paste(big, (i % columns * cell, (i // columns * len(rows) + k) * cell))
    return page
