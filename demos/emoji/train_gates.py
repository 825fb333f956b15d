"""Train what the compositions are compared with: gates of two families (data-free), and the two ceilings.

    python demos/emoji/train_gates.py [gates] [mole] [joint] [oracle]

`gates` writes assets/gates/NAME; the rest goes to work/. Results that exist are kept, so a cut-off run goes on.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from compose import joint_samples, lesson, name_of, true_samples
from loop import WORK, device, note, small_attention

from mole_diffusers import GateConfig, attach, detach, emoji, emoji_world
from mole_diffusers.training.concept import ConceptConfig, save_lora, train_lora
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.data import encode
from mole_diffusers.training.loop import train_gates
from mole_diffusers.training.study import Lesson

GATES = GateConfig("flow")
MOLE = GateConfig("mole", granularity="layer", total="linear")
REDRAW = 0.55  # of the noise levels, where a style comes over subjects that were drawn without it
TRAINING = GateTraining(terms={"collage": {"guidance": 3.0}}, steps=60, batch=6, lr=1e-2, precision="bf16")
JOINT = ConceptConfig(
    rank=16, alpha=16.0, layers=("attention", "feed-forward"), steps=200, lr=3e-3, text_lr=1.5e-3, autocast=torch.bfloat16
)
ORACLE = GateConfig("static", granularity="layer", total="linear", bins=4)
ORACLE_TRAINING = GateTraining(terms={"denoise": {"guidance": 3.0}}, steps=60, batch=6, lr=5e-2, precision="bf16")


def make_gates(world, concepts, config=GATES, root: Path | None = None):
    folder = (root or world.folder / "gates") / name_of(concepts)
    if not (folder / "config.json").exists():
        mixture = attach(world.pipe, {c: world.loras[c] for c in concepts}, config)
        found = lesson(concepts)
        collage = {"collage": {"guidance": 3.0, "redraw": REDRAW if found.styles else 0.0}}
        train_gates(world.pipe, mixture, found, config=replace(TRAINING, terms=collage))
        mixture.save_pretrained(folder, dtype=torch.float16)


def make_mole(world, concepts):
    make_gates(world, concepts, MOLE, WORK / "mole")


def make_joint(world, concepts):
    path = WORK / "joint" / f"{name_of(concepts)}.safetensors"
    if not path.exists():
        detach(world.pipe)
        tensors = train_lora(world.pipe, joint_samples(world, concepts), JOINT, name=name_of(concepts))
        save_lora(tensors, path, alpha=JOINT.alpha, rank=JOINT.rank)


def make_oracle(world, concepts):
    folder = WORK / "oracle" / name_of(concepts)
    if not (folder / "config.json").exists():
        detach(world.pipe)
        samples = true_samples(world, concepts, encode)
        mixture = attach(world.pipe, {c: world.loras[c] for c in concepts}, ORACLE)
        train_gates(world.pipe, mixture, Lesson(samples=samples), config=ORACLE_TRAINING)
        mixture.save_pretrained(folder)


def main() -> None:
    makers = {"gates": make_gates, "mole": make_mole, "joint": make_joint, "oracle": make_oracle}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=list(makers), help=f"of {list(makers)}; default: all")
    world = emoji_world(device=str(device()))
    for what in parser.parse_args().what:
        if what not in makers:
            parser.error(f"unknown {what!r}; known: {list(makers)}")
        start = time.time()
        for i, concepts in enumerate(emoji.COMPOSITIONS):
            print(f"{what} {i + 1}/{len(emoji.COMPOSITIONS)} {'+'.join(concepts)}, {time.time() - start:.0f} s", flush=True)
            with small_attention():
                makers[what](world, concepts)
        note(what, seconds=round(time.time() - start))


if __name__ == "__main__":
    main()
