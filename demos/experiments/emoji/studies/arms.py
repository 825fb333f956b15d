"""Every composer that is compared on the emoji world."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from compose import name_of
from loop import WORK
from train_gates import FAMILIES, UNSEEN

from mole_diffusers.evaluation import arms, choosing
from mole_diffusers.evaluation.runner import Arm, Bench, Case

BLENDED = "flow gates, blended"  # LoRA-Flow's form, trained on blends of the LoRAs in place of collages
PROMPTED = "flow gates, five prompts"  # of the composition, where the others have one
MIXED = "flow gates, mixed"  # trained by all three terms: single LoRAs, their blends, and collages
STILL = ("prompt",)  # it speaks once per prompt: no average over time


def joint_file(case: Case) -> Path:
    """The LoRA that was trained on all concepts of a case."""
    return WORK / "joint" / f"{name_of(case.concepts)}.safetensors"


def families() -> list[Arm]:
    """The trained gates of every family but the committed one, each followed by its controls on two concepts."""
    found = []
    for family in FAMILIES:
        for name, inside in arms.CONTROLS.items():
            if family != "flow" and not (family in STILL and name == "gates averaged"):
                label = name.replace("gates", family if name != "gates" else f"{family} gates")
                arm = arms.gated(label, arms.gates_of(WORK / "gates" / family), inside=inside)
                found.append(arm if name == "gates" else _on_two(arm))
    return found


def _on_two(arm: Arm) -> Arm:
    """The arm on cases of two concepts: on three, the gates that it would control show nothing."""
    return replace(arm, covers=lambda case: len(case.concepts) == 2 and arm.covers(case))


def gates_in_a_crowd(world) -> Arm:
    """The committed gates, and those that were trained beside further LoRAs."""
    alone, beside = arms.gates_of(world.folder / "gates"), arms.gates_of(WORK / "gates" / "crowded")
    return arms.gated("gates", lambda case: beside(case) if case.idle else alone(case))


def unseen() -> Arm:
    """Retrieval gates on LoRAs that they were not trained with."""
    arm = arms.gated("unseen", lambda case: WORK / "unseen")
    return replace(arm, covers=lambda case: not set(case.experts) & set(UNSEEN) and arm.covers(case))


def all_arms(
    world, bench: Bench, weights: Mapping[str, Mapping[str, float]] | None = None, *, validation: bool = False
) -> list[Arm]:
    """Arms that need no training, the trained gates, and the ceilings; `weights` are those that a search found."""
    committed = WORK / "gates" / "flow" if validation else world.folder / "gates"
    return [
        *choosing.chosen_arms(choosing.ARMS, bench, committed, weights=weights),
        *families(),
        arms.gated(BLENDED, arms.gates_of(WORK / "gates" / "blend")),
        arms.gated(MIXED, arms.gates_of(WORK / "gates" / "mixed")),
        arms.gated(PROMPTED, arms.gates_of(WORK / "gates" / "prompts")),
        unseen(),
        *(arms.gated(f"{family} oracle", arms.gates_of(WORK / "oracle" / family)) for family in FAMILIES),
        arms.from_file("joint LoRA", joint_file),
    ]
