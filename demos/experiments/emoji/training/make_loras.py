"""Teach the base what it has never seen: a LoRA per held-out subject and style, by the project's concept training.

    python demos/experiments/emoji/training/make_loras.py [NAME ...]

A subject is shown in every base style, alone and beside base subjects; a style over every base subject. No LoRA sees a
held-out subject in a held-out style. Ranks 4, 8 and 16 and two sets of layers are mixed; two files are in kohya's
format with alpha != rank. Files that exist are kept, so an interrupted run goes on.
"""

import argparse
import time

import numpy as np
from loop import device, note, small_attention

from mole_diffusers import emoji, emoji_world
from mole_diffusers.training.config import LoraTraining
from mole_diffusers.training.data import Samples, encode
from mole_diffusers.training.lora_adapter import save_kohya, save_lora
from mole_diffusers.training.lora_trainer import train_lora

PICTURES = 640
KOHYA = ("octopus", "duotone")
WIDE = ("attention", "feed-forward")
SIZES = {  # rank and layers, mixed as artists' files are
    "octopus": (8, ("attention",)),
    "sunflower": (16, ("attention",)),
    "doughnut": (4, WIDE),
    "honeybee": (8, ("attention",)),
    "tiger": (8, ("attention",)),
    "glossy": (8, WIDE),
    "flat": (8, ("attention",)),
    "ink": (8, ("attention",)),
    "koala": (8, ("attention",)),
    "blueprint": (4, WIDE),
}
STEPS = {"koala": 480, "octopus": 480, "ink": 600, "glossy": 600}  # where 240 (a style: 360) left one style or subject out


def scenes(concept: str, count: int, rng: np.random.Generator) -> list[emoji.Scene]:
    """Training scenes of one concept: a style over base subjects, or a subject in base styles and beside others."""
    out = []
    while len(out) < count:
        if concept in emoji.STYLES:
            out.append(emoji.draw_scene(emoji.BASE_SUBJECTS, (concept,), rng, pairs=0.35))
            continue
        scene = emoji.draw_scene(emoji.BASE_SUBJECTS, emoji.BASE_STYLES, rng, pairs=0.45)
        slot = int(rng.integers(len(scene.subjects)))
        subjects = tuple(concept if i == slot else s for i, s in enumerate(scene.subjects))
        out.append(emoji.Scene(subjects, scene.style, scene.background))
    return out


def concept_samples(world, concept: str, count: int = PICTURES) -> Samples:
    """The concept's pictures as latents with captions."""
    rng = np.random.default_rng(sum(map(ord, concept)))
    chosen = scenes(concept, count, rng)
    return encode(world.pipe, [world.drawings.picture(s, rng) for s in chosen], [s.caption for s in chosen])


def config(concept: str) -> LoraTraining:
    """Rank 4 and attention alone, unless `SIZES` says otherwise; a style has more to learn than a subject."""
    style = concept in emoji.STYLES
    rank, layers = SIZES.get(concept, (4, ("attention",)))
    alpha = rank / 2 if concept in KOHYA else rank
    return LoraTraining(
        rank=rank,
        alpha=alpha,
        layers=layers,
        steps=STEPS.get(concept, 360 if style else 240),
        lr=2e-3 * (rank / alpha) ** 0.5,
        text_lr=1e-3,
        precision="bf16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*emoji.HELD_OUT_SUBJECTS, *emoji.HELD_OUT_STYLES])
    names = parser.parse_args().names
    world = emoji_world(device=str(device()))
    folder = world.folder / "loras"
    for i, name in enumerate(names):
        path = folder / f"{name.replace(' ', '_')}.safetensors"
        if path.exists():
            continue
        start, settings = time.time(), config(name)
        samples = concept_samples(world, name)
        with small_attention():
            tensors = train_lora(world.pipe, samples, settings, name=f"{i + 1}/{len(names)} {name}")
        if name in KOHYA:
            save_kohya(tensors, path, alpha=settings.alpha, triggers=name)
        else:
            save_lora(tensors, path, alpha=settings.alpha, rank=settings.rank, triggers=name)
        note(
            f"lora {name}",
            rank=settings.rank,
            layers=settings.layers,
            steps=settings.steps,
            seconds=round(time.time() - start),
        )


if __name__ == "__main__":
    main()
