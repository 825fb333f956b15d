"""Teach the base new concepts: a LoRA per held-out subject and style, or for any other drawn concept by name.

    python demos/experiments/emoji/make_loras.py [NAME ...]

A subject is shown in every base style, alone and next to base subjects on wide and tall canvases. A style is shown on the
base subjects. No LoRA sees a held-out subject in a held-out style. The LoRAs have ranks 4, 8 and 16 and two sets of layers,
and two files are in kohya's format with alpha != rank. Existing files are kept, so you can continue an interrupted run.
"""

import argparse
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import train_base
from loop import mixed_precision, note, small_attention
from random_scenes import draw_scene, random_picture
from torch import nn

from mole_diffusers.emoji import words
from mole_diffusers.emoji.drawings import Drawings, default_folder
from mole_diffusers.emoji.scenes import Scene
from mole_diffusers.patching.undo import undoing
from mole_diffusers.training.config import LoraTraining
from mole_diffusers.training.data import RandomBatch, Samples
from mole_diffusers.training.denoising import denoising_loss
from mole_diffusers.training.latents import encode
from mole_diffusers.training.lora_adapter import add_lora, save_lora

PICTURES = {"one": 320, "wide": 320, "tall": 320}  # encoded pictures per canvas
BATCH = {"one": 16, "wide": 8, "tall": 8}  # pictures per update
TURNS = ("wide", "tall", "one", "wide", "tall")  # four fifths are pairs; with fewer, a LoRA colours its neighbour
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
    "tiger": Recipe(rank=16, layers=(*WIDE, "convolution")),
    "koala": Recipe(rank=4),
    "duotone": Recipe(text_lr=1e-3),
    "thermal": Recipe(rank=4),
    "blueprint": Recipe(rank=4),
}


def recipe(concept: str) -> Recipe:
    return RECIPES.get(concept, Recipe())


def concept_scene(concept: str, shape: str, rng: np.random.Generator) -> Scene:
    """A training scene: a style on base subjects, or a subject in a base style, alone or next to a base subject."""
    while True:
        count = 1 if shape == "one" else 2
        if concept in words.STYLES:
            scene = draw_scene(words.BASE_SUBJECTS, (concept,), rng, count=count)
        else:
            scene = draw_scene(words.BASE_SUBJECTS, words.BASE_STYLES, rng, count=count)
            slot = int(rng.integers(count))
            subjects = tuple(concept if i == slot else s for i, s in enumerate(scene.subjects))
            scene = Scene(subjects, scene.style, scene.background, scene.relation, scene.upright)
        width, height = scene.size
        if {"wide": width > height, "tall": height > width}.get(shape, True):
            return scene


def concept_samples(pipe, drawings: Drawings, concepts: tuple[str, ...]) -> dict[str, Samples]:
    """Pictures of each concept by itself, as latents with captions, by canvas."""
    rng = np.random.default_rng([sum(map(ord, c)) for c in concepts])
    found = {}
    for shape, count in PICTURES.items():
        scenes = [concept_scene(concepts[i % len(concepts)], shape, rng) for i in range(count * len(concepts))]
        found[shape] = encode(pipe, [random_picture(drawings, s, rng) for s in scenes], [s.caption for s in scenes])
    return found


def train(pipe, samples: dict[str, Samples], chosen: Recipe, alpha: float) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA trained on the canvases in turn. The pipeline is left as it was."""
    config = LoraTraining(
        rank=chosen.rank, alpha=alpha, layers=chosen.layers, steps=chosen.steps, lr=chosen.lr, text_lr=chosen.text_lr
    )
    with undoing() as undo, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = add_lora(pipe, config, undo)
        slower = (chosen.rank / alpha) ** 0.5
        groups = lora.groups({part: lr * slower for part, lr in config.rates.items()})
        optimizer = torch.optim.AdamW(groups)
        fall = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min(1, (i + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * i / chosen.steps))
        )
        generator = torch.Generator().manual_seed(0)
        for step in range(chosen.steps):
            shape = TURNS[step % len(TURNS)]
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
    names = parser.parse_args().names
    pipe, drawings = train_base.trained(), Drawings(default_folder())
    folder = default_folder() / "loras"
    for name in names:
        path = folder / f"{name.replace(' ', '_')}.safetensors"
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        start, chosen = time.time(), recipe(name)
        alpha = chosen.rank / 2 if name in KOHYA else chosen.rank
        tensors = train(pipe, concept_samples(pipe, drawings, (name,)), chosen, alpha)
        save_lora(tensors, path, alpha=alpha, triggers=name, format="kohya" if name in KOHYA else "diffusers")
        note(f"lora {name}", rank=chosen.rank, steps=chosen.steps, seconds=round(time.time() - start))


if __name__ == "__main__":
    main()
