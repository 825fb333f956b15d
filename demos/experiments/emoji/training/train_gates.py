"""Train what the compositions are compared with: gates of every family (data-free), and the ceilings.

    python demos/experiments/emoji/training/train_gates.py [WHAT ...]

`gates` writes assets/gates/NAME; the rest goes to work/. `families` and `validation` make gates by all three terms, too.
Results that exist are kept, so a cut-off run goes on.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from compose import crowd, joint_samples, lesson, name_of, true_samples, unseen_backgrounds
from loop import WORK, device, note, small_attention

from mole_diffusers import GateConfig, attach, detach, emoji, emoji_world
from mole_diffusers.training.config import GateTraining, LoraTraining
from mole_diffusers.training.data import TrainingData, encode
from mole_diffusers.training.gate_trainer import train_gates
from mole_diffusers.training.lora_adapter import save_lora
from mole_diffusers.training.lora_trainer import train_lora

FAMILIES = {
    "flow": GateConfig("flow"),
    "paper": GateConfig("mole", granularity="block", total="1"),  # MoLE's softmax per block, on the block's pooled state
    "mole": GateConfig("mole", granularity="layer", total="linear"),
    "static": GateConfig("static", granularity="layer", total="linear", bins=4),
    "prompt": GateConfig("prompt", axis="both", total="N"),
    "rank": GateConfig("rank"),
    "retrieval": GateConfig("retrieval", total="N"),
}
REDRAW = 0.55  # share of the noise levels in which a style is drawn over subjects that were drawn without it
TRAINING = GateTraining(terms={"collage": {"guidance": 3.0}}, steps=60, batch=6, lr=1e-2, precision="bf16")
BLENDS = {"single": 1.0, "composed": 1.0}  # terms of the single LoRAs, and of their blends
BLEND = replace(TRAINING, terms=BLENDS)  # without collages
RATES = {"rank": 3e-3, "retrieval": 3e-3}  # best on validation (objectives.py), if not 1e-2
JOINT = LoraTraining(
    rank=16, alpha=16.0, layers=("attention", "feed-forward"), steps=200, lr=3e-3, text_lr=1.5e-3, precision="bf16"
)
ORACLE_TRAINING = GateTraining(terms={"denoise": {"guidance": 3.0}}, steps=60, batch=6, lr=1e-2, precision="bf16")
ORACLE_RATES = {"static": 5e-2, "mole": 5e-2}  # they have a weight per expert where the others have a matrix
UNSEEN = emoji.VALIDATION_SUBJECTS + emoji.VALIDATION_STYLES + ("sunflower", "doughnut", "glossy")  # half of the LoRAs
UPDATES = 30  # on each composition of the gates that see half of the LoRAs


def recipe(concepts, family: str) -> GateTraining:
    """The data-free training of one composition."""
    redraw = REDRAW if lesson(concepts).styles else 0.0
    terms = {"collage": {"guidance": 3.0, "redraw": redraw}}
    return replace(TRAINING, terms=terms, lr=RATES.get(family, TRAINING.lr))


def make_gates(
    world,
    concepts,
    family: str = "flow",
    root: Path | None = None,
    *,
    training: GateTraining | None = None,
    idle=(),
    backgrounds=("white",),
    binding=None,
):
    """Below `root`, or among the committed gates; `idle` LoRAs are attached beside those of the composition."""
    folder = (root or world.folder / "gates") / name_of(concepts + idle)
    if not (folder / "config.json").exists():
        detach(world.pipe)
        mixture = attach(world.pipe, {c: world.loras[c] for c in concepts + idle}, FAMILIES[family], binding=binding)
        found = lesson(concepts, backgrounds)
        train_gates(world.pipe, mixture, found, config=training or recipe(concepts, family))
        mixture.save_pretrained(folder, dtype=torch.float16)


def make_mixed(world, concepts):
    """Gates by all three terms: single LoRAs, their blends, and collages."""
    usual = recipe(concepts, "flow")
    make_gates(world, concepts, root=WORK / "gates" / "mixed", training=replace(usual, terms=BLENDS | usual.terms))


def make_bound(world, concepts):
    """Gates that learn while each LoRA is bound to its words."""
    make_gates(world, concepts, root=WORK / "gates" / "bound", binding={})


def make_from_prompts(world, concepts):
    """Gates that learn a composition from five prompts in place of one, with as many pictures in all."""
    usual = recipe(concepts, "flow")
    terms = {"collage": usual.terms["collage"] | {"pictures": 10, "seeds": 4}}
    others, root = unseen_backgrounds(concepts), WORK / "gates" / "prompts"
    make_gates(world, concepts, root=root, training=replace(usual, terms=terms), backgrounds=others)


def make_joint(world, concepts):
    path = WORK / "joint" / f"{name_of(concepts)}.safetensors"
    if not path.exists():
        detach(world.pipe)
        tensors = train_lora(world.pipe, joint_samples(world, concepts), JOINT, name=name_of(concepts))
        save_lora(tensors, path, alpha=JOINT.alpha, rank=JOINT.rank)


def make_oracle(world, concepts, family: str):
    folder = WORK / "oracle" / family / name_of(concepts)
    if not (folder / "config.json").exists():
        detach(world.pipe)
        samples = true_samples(world, concepts, encode)
        mixture = attach(world.pipe, {c: world.loras[c] for c in concepts}, FAMILIES[family], binding=None)
        config = replace(ORACLE_TRAINING, lr=ORACLE_RATES.get(family, ORACLE_TRAINING.lr))
        train_gates(world.pipe, mixture, TrainingData(samples=samples), config=config)
        mixture.save_pretrained(folder)


def seen_compositions() -> list[emoji.Concepts]:
    """Compositions of two concepts that are made of `UNSEEN`'s LoRAs alone."""
    pairs = [c for split in (emoji.VALIDATION, emoji.TEST) for group in split.values() for c in group if len(c) == 2]
    return [c for c in pairs if set(c) <= set(UNSEEN)]


def make_unseen(world):
    """Retrieval gates that learn from half of the LoRAs, one composition at a time, to be used on the other half.

    All of the half are attached, so that there are gates for every layer that any of them has.
    """
    folder = WORK / "unseen"
    if (folder / "config.json").exists():
        return
    detach(world.pipe)
    mixture = attach(world.pipe, {c: world.loras[c] for c in UNSEEN}, FAMILIES["retrieval"], binding=None)
    for i, concepts in enumerate(seen_compositions()):
        with mixture.only(*concepts):
            config = replace(recipe(concepts, "retrieval"), steps=UPDATES, seed=i)
            train_gates(world.pipe, mixture, lesson(concepts), config=config)
    mixture.save_pretrained(folder)


def jobs(what: str, world) -> list[tuple[str, Callable[[], None]]]:
    """Name and function of each thing to make for one of the words on the command line."""

    def of(cases, maker, *arguments):
        return [(name_of(c), lambda c=c: maker(world, c, *arguments)) for c in cases]

    if what == "gates":
        return of(emoji.COMPOSITIONS, make_gates)
    if what == "bound":
        return of(emoji.COMPARED[:16], make_bound)
    if what == "joint":
        return of(emoji.COMPARED, make_joint)
    if what == "blend":
        subjects = [c for c in emoji.COMPARED if not lesson(c).styles]
        return of(subjects, lambda w, c: make_gates(w, c, root=WORK / "gates" / "blend", training=BLEND))
    if what == "prompts":
        return of(emoji.VALIDATED + emoji.COMPARED[:16], make_from_prompts)
    if what == "crowded":
        root, cases = WORK / "gates" / "crowded", [case for case in crowd() if case.idle]
        return [(c.name, lambda c=c: make_gates(world, c.concepts, root=root, idle=c.idle)) for c in cases]
    if what == "unseen":
        return [(what, lambda: make_unseen(world))]
    if what == "oracle":
        return [job for family in FAMILIES for job in of(emoji.COMPARED, make_oracle, family)]
    cases = emoji.COMPARED if what == "families" else emoji.VALIDATED
    families = [f for f in FAMILIES if f != "flow" or what == "validation"]
    found = [job for family in families for job in of(cases, make_gates, family, WORK / "gates" / family)]
    return found + of(cases, make_mixed)


def main() -> None:
    known = ["gates", "bound", "families", "blend", "prompts", "crowded", "validation", "joint", "oracle", "unseen"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=known, help=f"of {known}; default: all")
    what = parser.parse_args().what
    if unknown := set(what) - set(known):
        parser.error(f"unknown {sorted(unknown)}; known: {known}")
    world = emoji_world(device=str(device()))
    for word in what:
        start, found = time.time(), jobs(word, world)
        for i, (name, make) in enumerate(found):
            print(f"{word} {i + 1}/{len(found)} {name}, {time.time() - start:.0f} s", flush=True)
            with small_attention():
                make()
        note(word, seconds=round(time.time() - start))


if __name__ == "__main__":
    main()
