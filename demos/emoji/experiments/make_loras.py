"""Teach the base new concepts: a LoRA per held-out subject and style, or for any other drawn concept by name.

    python demos/emoji/experiments/make_loras.py [NAME ...] [--beside] [--to FOLDER]

A subject is taught as artists teach one: from pictures of it alone, in every base style, in open and named landscapes.
`--beside` teaches it from pictures in which it also stands beside base subjects. A LoRA that never saw its subject beside
another colours its neighbour; this is what a composer should undo. A style is shown on one or two base subjects. No LoRA
sees a held-out subject in a held-out style. The LoRAs have ranks 4, 8 and 16 and two sets of layers, and two files are in
kohya's format with alpha != rank. Existing files are kept, so you can continue an interrupted run.
"""

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import train_base
from latents import CANVASES
from loop import mixed_precision, note, small_attention
from random_scenes import draw_scene, random_caption, random_picture
from torch import nn

from mole_diffusers.training import LoraTraining, RandomBatch, Samples, denoising_loss, encode, new_lora, save_lora
from mole_world import words
from mole_world.drawings import Drawings, default_folder
from mole_world.scenes import Scene

PICTURES = {"one": 320, "wide": 320, "tall": 320, "broad": 128, "high": 128, "large": 96}  # encoded pictures per canvas
BATCH = {"one": 16, "wide": 8, "tall": 8, "broad": 10, "high": 10, "large": 6}  # pictures per update
ALONE = ("one", "one", "broad", "one", "one", "high", "large")  # canvases in turn, with one subject in each picture
BESIDE = ("wide", "tall", "one", "wide", "tall")  # four fifths are pairs; with fewer, a LoRA colours its neighbour
KOHYA = ("octopus", "duotone")
WIDE = ("attention", "feed-forward")  # with only attention layers, a LoRA stays soft


@dataclass(frozen=True)
class Recipe:
    """How a concept is taught. Alpha is the rank, or half of it if the file is in kohya's format."""

    rank: int = 8
    layers: tuple[str, ...] = WIDE
    steps: int = 400
    lr: float = 6e-3
    text_lr: float = 0.0  # a subject LoRA in the text encoder pushes the style word away


RECIPES = {  # ranks and layers are mixed, like in artists' files
    "sunflower": Recipe(rank=16),
    "doughnut": Recipe(rank=4),
    "tiger": Recipe(layers=(*WIDE, "convolution")),
    "koala": Recipe(rank=4),
    "duotone": Recipe(rank=4, layers=(*WIDE, "convolution"), text_lr=1e-3, steps=600),
    "relief": Recipe(layers=(*WIDE, "convolution"), steps=600),
    "thermal": Recipe(rank=4),
    "blueprint": Recipe(rank=4),
}


def recipe(concept: str) -> Recipe:
    return RECIPES.get(concept, Recipe())


def turns(concept: str, beside: bool) -> tuple[str, ...]:
    """The canvases, in turn, on which a concept is taught."""
    return BESIDE if beside or concept in words.STYLES else ALONE


def concept_scene(concept: str, shape: str, rng: np.random.Generator) -> Scene:
    """A training scene: a style on base subjects, or a subject in a base style, alone or next to a base subject."""
    while True:
        count = 2 if shape in ("wide", "tall") else 1
        if concept in words.STYLES:
            scene = draw_scene(words.BASE_SUBJECTS, (concept,), rng, count=count)
        else:
            scene = draw_scene(words.BASE_SUBJECTS, words.BASE_STYLES, rng, count=count)
            slot = int(rng.integers(count))
            scene = replace(scene, subjects=tuple(concept if i == slot else s for i, s in enumerate(scene.subjects)))
        width, height = scene.size
        if {"wide": width > height, "tall": height > width}.get(shape, True):
            return replace(scene, canvas=CANVASES.get(shape))


def concept_samples(
    pipe, drawings: Drawings, concepts: tuple[str, ...], shapes: Iterable[str] = BESIDE
) -> dict[str, Samples]:
    """Pictures of each concept by itself, as latents with captions, by canvas."""
    rng = np.random.default_rng([sum(map(ord, c)) for c in concepts])
    found = {}
    for shape in dict.fromkeys(shapes):
        scenes = [concept_scene(concepts[i % len(concepts)], shape, rng) for i in range(PICTURES[shape] * len(concepts))]
        found[shape] = encode(
            pipe, [random_picture(drawings, s, rng) for s in scenes], [random_caption(s, rng) for s in scenes]
        )
    return found


def train(
    pipe, samples: dict[str, Samples], chosen: Recipe, alpha: float, shapes: Sequence[str] = BESIDE
) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA trained on the canvases in turn. The pipeline is left as it was."""
    config = LoraTraining(
        rank=chosen.rank, alpha=alpha, layers=chosen.layers, steps=chosen.steps, lr=chosen.lr, text_lr=chosen.text_lr
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with new_lora(pipe, config) as lora:
            slower = (chosen.rank / alpha) ** 0.5
            groups = lora.groups({part: lr * slower for part, lr in config.rates.items()})
            optimizer = torch.optim.AdamW(groups)
            fall = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda i: min(1, (i + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * i / chosen.steps))
            )
            generator = torch.Generator().manual_seed(0)
            for step in range(chosen.steps):
                shape = shapes[step % len(shapes)]
                with small_attention(), mixed_precision():
                    loss = denoising_loss(pipe, samples[shape], RandomBatch(generator, BATCH[shape]))
                loss.backward()
                for group in groups:
                    nn.utils.clip_grad_norm_(group["params"], 1.0)
                optimizer.step()
                optimizer.zero_grad()
                fall.step()
            return lora.tensors()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*words.HELD_OUT_SUBJECTS, *words.HELD_OUT_STYLES])
    parser.add_argument("--beside", action="store_true", help="teach subjects beside others, too")
    parser.add_argument("--to", type=Path, help="the folder for the files; by default that of the world")
    args = parser.parse_args()
    pipe, drawings = train_base.trained(), Drawings(default_folder())
    folder = args.to or default_folder() / "loras"
    for name in args.names:
        path = folder / f"{name.replace(' ', '_')}.safetensors"
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True, parents=True)
        start, chosen = time.time(), recipe(name)
        alpha = chosen.rank / 2 if name in KOHYA else chosen.rank
        shapes = turns(name, args.beside)
        tensors = train(pipe, concept_samples(pipe, drawings, (name,), shapes), chosen, alpha, shapes)
        save_lora(tensors, path, alpha=alpha, triggers=name, format="kohya" if name in KOHYA else "diffusers")
        note(f"lora {name}", rank=chosen.rank, steps=chosen.steps, seconds=round(time.time() - start))


if __name__ == "__main__":
    main()
