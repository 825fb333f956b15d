"""Every composer that is compared on the emoji world."""

from collections.abc import Mapping
from pathlib import Path

from compose import name_of
from loop import WORK
from train_gates import FAMILIES, UNSEEN

from mole_diffusers.evaluation import arms
from mole_diffusers.evaluation.runner import Arm, Case

STILL = ("prompt",)  # it speaks once per prompt: no average over time


def folder(root: Path):
    """Where a case's gates lie."""
    return lambda case: root / name_of(case.concepts)


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
                arm = arms.gated(label, folder(WORK / "gates" / family), inside=inside)
                found.append(arm if inside is None else _on_two(arm))
    return found


def _on_two(arm: Arm) -> Arm:
    """The arm on cases of two concepts: on three, the gates that it would control show nothing."""
    return Arm(arm.name, arm.draws, arm.settings, covers=lambda case: len(case.concepts) == 2 and arm.covers(case))


def unseen() -> Arm:
    """Retrieval gates on LoRAs that they were not trained with."""
    arm = arms.gated("unseen", lambda case: WORK / "unseen")
    return Arm(arm.name, arm.draws, covers=lambda case: not set(case.experts) & set(UNSEEN) and arm.covers(case))


def all_arms(world, weights: Mapping[str, Mapping[str, float]] | None = None, *, validation: bool = False) -> list[Arm]:
    """Arms that need no training, the trained gates, and the ceilings; `weights` are those that a search found."""
    from mole_diffusers.evaluation.emoji_protocol import bench

    committed = WORK / "gates" / "flow" if validation else world.folder / "gates"
    return [
        *arms.chosen_arms(arms.ARMS, bench(world), committed, weights=weights),
        *families(),
        unseen(),
        *(arms.gated(f"{family} oracle", folder(WORK / "oracle" / family)) for family in FAMILIES),
        arms.from_file("joint LoRA", joint_file),
    ]
