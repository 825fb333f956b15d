"""Train the gates that come with the world, for a few compositions, on bound LoRAs and from prompts alone.

    python demos/emoji/experiments/train_gates.py [CONCEPT+CONCEPT ...] [--gate-type factors] [--to work/gates/factors]
    python demos/emoji/experiments/train_gates.py CONCEPT+CONCEPT ... --gate-type outputs --unbound --to work/paper

This writes `assets/gates/NAME`, or `FOLDER/NAME`. `compose.py` draws with the gates in work/gates/FAMILY and in work/paper.
Existing gates are kept, so you can continue an interrupted run. The gate type "outputs" is as in MoLE's paper: flattened
features, and the balance loss. The world has no CLIP, so the other loss is that of the collages.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from loop import device, multiplies_bf16, note, small_attention

import mole_world
from mole_diffusers import GateConfig, attach, detach
from mole_diffusers.training import GateTraining, TrainingData, train_gates
from mole_world import EmojiWorld, emoji_world

SHOWN = ("sunflower+doughnut", "honeybee+thermal", "fox+relief")
TRAINING = GateTraining(terms={"collage": 1.0}, steps=60, batch=6)
PAPER = {"collage": 1.0, "balance": 0.5}


def lesson(concepts: mole_world.Concepts) -> TrainingData:
    """The composition's prompt, and a prompt for each of its subjects alone, in the same style."""
    scene = mole_world.composition_scene(concepts)
    parts = {scene.caption: [mole_world.Scene((subject,), scene.style).caption for subject in scene.subjects]}
    styles = [concept for concept in concepts if concept in mole_world.words.STYLES]
    return TrainingData(composed=[scene.caption], styles=styles, parts=parts)


def gates_for(gates: str | GateConfig, concepts: mole_world.Concepts) -> GateConfig:
    """Gates of a type, by default with its own options. Flattened features fit the canvas of this composition."""
    if isinstance(gates, GateConfig) or gates != "outputs":
        return gates if isinstance(gates, GateConfig) else GateConfig(gates)
    width, height = mole_world.composition_scene(concepts).size
    return GateConfig("outputs", features="flattened", area=width * height / mole_world.scenes.SIDE**2)


def recipe(concepts: mole_world.Concepts) -> GateTraining:
    """Settings for a composition's gates: they train on its own canvas."""
    width, height = mole_world.composition_scene(concepts).size
    return replace(TRAINING, precision="bf16" if multiplies_bf16() else "no", width=width, height=height)


def train(
    world: EmojiWorld, concepts: mole_world.Concepts, gate_type: str, folder: Path, *, updates: int, unbound: bool = False
) -> None:
    """Train gates and write them to `folder`, unless they are already there. LoRAs are bound unless they are `unbound`."""
    if (folder / "config.json").exists():
        return
    start = time.time()
    detach(world.pipe)
    experts, binding = {concept: world.loras[concept] for concept in concepts}, None if unbound else "auto"
    mixture = attach(world.pipe, experts, gates_for(gate_type, concepts), binding=binding)
    config = replace(recipe(concepts), steps=updates, terms=PAPER if gate_type == "outputs" else TRAINING.terms)
    with small_attention():
        log = train_gates(world.pipe, mixture, lesson(concepts), config=config)
    mixture.save_pretrained(folder, dtype=torch.float16)
    detach(world.pipe)
    note(f"gates {folder.name}", loss=round(log[-1]["loss"], 4), seconds=round(time.time() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=SHOWN)
    parser.add_argument("--gate-type", default="flow", help="of the gates; the examples' vary from token to token")
    parser.add_argument("--unbound", action="store_true", help="every LoRA acts everywhere, as in the papers")
    parser.add_argument("--updates", type=int, default=TRAINING.steps)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: the world's own gates")
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    for name in args.names:
        folder = (args.to or world.folder / "gates") / name.replace(" ", "_")
        train(world, tuple(name.split("+")), args.gate_type, folder, updates=args.updates, unbound=args.unbound)


if __name__ == "__main__":
    main()
