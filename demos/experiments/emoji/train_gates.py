"""Gates that come with the world, for a few compositions, trained on bound LoRAs from prompts alone.

    python demos/experiments/emoji/train_gates.py [CONCEPT+CONCEPT ...] [--family factors] [--to FOLDER]

Writes `assets/gates/NAME`, or `FOLDER/NAME`: `compose.py` draws with those in work/gates. Gates that exist are kept, so an
interrupted run goes on.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from loop import device, multiplies_bf16, note, small_attention

from mole_diffusers import EmojiWorld, GateConfig, attach, detach, emoji, emoji_world
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.data import TrainingData
from mole_diffusers.training.gate_trainer import train_gates

SHOWN = ("sunflower+doughnut", "honeybee+thermal", "fox+relief")
TRAINING = GateTraining(terms={"collage": 1.0}, steps=60, batch=6)


def lesson(concepts: emoji.Concepts) -> TrainingData:
    """The composition's prompt, with a prompt of each of its subjects by itself in the same style."""
    scene = emoji.composition_scene(concepts)
    parts = {scene.caption: [emoji.Scene((subject,), scene.style).caption for subject in scene.subjects]}
    styles = [concept for concept in concepts if concept in emoji.words.STYLES]
    return TrainingData(composed=[scene.caption], styles=styles, parts=parts)


def recipe(concepts: emoji.Concepts) -> GateTraining:
    """How gates of a composition are trained: on its own canvas."""
    width, height = emoji.composition_scene(concepts).size
    return replace(TRAINING, precision="bf16" if multiplies_bf16() else "no", width=width, height=height)


def train(world: EmojiWorld, concepts: emoji.Concepts, gates: str | GateConfig, folder: Path, *, updates: int) -> None:
    """Train gates of bound LoRAs and write them to `folder`, where they are not there yet."""
    if (folder / "config.json").exists():
        return
    start = time.time()
    detach(world.pipe)
    mixture = attach(world.pipe, {concept: world.loras[concept] for concept in concepts}, gates)
    with small_attention():
        log = train_gates(world.pipe, mixture, lesson(concepts), config=replace(recipe(concepts), steps=updates))
    mixture.save_pretrained(folder, dtype=torch.float16)
    detach(world.pipe)
    note(f"gates {folder.name}", loss=round(log[-1]["loss"], 4), seconds=round(time.time() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=SHOWN)
    parser.add_argument("--family", default="flow", help="of the gates; the examples' differ from token to token")
    parser.add_argument("--updates", type=int, default=TRAINING.steps)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: the world's own gates")
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    for name in args.names:
        folder = (args.to or world.folder / "gates") / name.replace(" ", "_")
        train(world, tuple(name.split("+")), args.family, folder, updates=args.updates)


if __name__ == "__main__":
    main()
