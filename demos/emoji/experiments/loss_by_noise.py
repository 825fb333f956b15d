"""The base's v loss at fixed noise levels, on scenes that it does not train on.

    python demos/emoji/experiments/loss_by_noise.py [CHECKPOINT ...]

This shows how well it uses texts and noisy pictures. A checkpoint is a file like `work/base.pt`; the default is the saved
base. The first line is the least possible loss at t = 999, where only the text gives information: the variance among the
pictures that one caption may describe.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import train_base
from encoder import patches
from latents import draw_shape
from loop import device, mixed_precision, to_tensor
from random_scenes import random_picture

from mole_world.drawings import Drawings, default_folder
from mole_world.scenes import Scene

LEVELS = (999, 930, 850, 700, 400)  # of 1000
SCENES = {"one": 96, "wide": 48, "tall": 48}
CAPTIONS, PICTURES = 150, 16  # for the least loss: captions, and pictures of each


def scenes_of(shape: str, count: int) -> tuple[list[Scene], np.random.Generator]:
    rng = np.random.default_rng([12345, list(SCENES).index(shape)])
    return [draw_shape(shape, rng, placed=0.2) for _ in range(count)], rng


def latents_of(drawings: Drawings, scenes: list[Scene], rng: np.random.Generator) -> torch.Tensor:
    """Latents [B, C, H / 4, W / 4] of random pictures of these scenes."""
    return patches(drawings)(to_tensor([random_picture(drawings, s, rng) for s in scenes]))


def least_loss(drawings: Drawings, shape: str) -> float:
    """The mean variance of latents that have the same caption."""
    scenes, rng = scenes_of(shape, CAPTIONS)
    return float(np.mean([latents_of(drawings, [s] * PICTURES, rng).var(0).mean() for s in scenes]))


@torch.no_grad()
def losses(both: torch.nn.ModuleDict, x: torch.Tensor, captions: list[str]) -> list[float]:
    """The loss at each of `LEVELS`, with the level as the seed of the noise."""
    tokenizer, scheduler = train_base.load_tokenizer(), train_base.build_scheduler()
    ids = tokenizer(captions, padding="max_length", max_length=train_base.TOKENS, return_tensors="pt").input_ids
    found = []
    for level in LEVELS:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(level)).to(x.device)
        t = torch.full((len(x),), level, device=x.device)
        with mixed_precision():
            v = both["unet"](scheduler.add_noise(x, noise, t), t, both["text_encoder"](ids.to(x.device))[0]).sample
        found.append(float((v.float() - scheduler.get_velocity(x, noise, t)).square().mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    paths, drawings = parser.parse_args().checkpoints, Drawings(default_folder())
    print("least at 999", {shape: round(least_loss(drawings, shape), 3) for shape in SCENES})
    both = train_base.build_both(train_base.load_tokenizer())
    averages = {path.name: torch.load(path, weights_only=True, map_location="cpu")["ema"] for path in paths}
    for name, weights in (averages or {"assets/base": train_base.saved_weights()}).items():
        both.load_state_dict(weights)
        for shape, count in SCENES.items():
            scenes, rng = scenes_of(shape, count)
            x = latents_of(drawings, scenes, rng).to(device())
            row = zip(LEVELS, losses(both, x, [s.caption for s in scenes]), strict=True)
            print(name, shape, {level: round(loss, 4) for level, loss in row}, flush=True)


if __name__ == "__main__":
    main()
