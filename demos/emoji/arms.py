"""Every composer that is compared on the emoji world."""

from collections.abc import Mapping
from pathlib import Path

from compose import name_of
from loop import WORK

from mole_diffusers.evaluation import arms
from mole_diffusers.evaluation.runner import Arm, Case


def folder(root: Path):
    """Where a case's gates lie."""
    return lambda case: root / name_of(case.concepts)


def joint_file(case: Case) -> Path:
    """The LoRA that was trained on all concepts of a case."""
    return WORK / "joint" / f"{name_of(case.concepts)}.safetensors"


def all_arms(world, weights: Mapping[str, Mapping[str, float]] | None = None) -> list[Arm]:
    """Arms that need no training, the trained gates, and the two ceilings; `weights` are those that a search found."""
    from mole_diffusers.evaluation.emoji_protocol import bench

    return [
        *arms.chosen_arms(arms.ARMS, bench(world), world.folder / "gates", weights=weights),
        arms.gated("mole gates", folder(WORK / "mole")),
        arms.gated("oracle gates", folder(WORK / "oracle")),
        arms.from_file("joint LoRA", joint_file),
    ]
