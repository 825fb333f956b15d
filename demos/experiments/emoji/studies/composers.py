"""Every composer that is compared on the emoji world, as arms of the evaluation."""

from dataclasses import replace
from pathlib import Path

from compose import name_of
from loop import WORK
from train_gates import FAMILIES, UNSEEN

from mole_diffusers.evaluation import arms
from mole_diffusers.evaluation.rows import digest_files
from mole_diffusers.evaluation.runner import Arm, Case, Setup

BLENDED = "flow gates, blended"  # LoRA-Flow's form, trained on blends of the LoRAs in place of collages
PROMPTED = "flow gates, five prompts"  # of the composition, where the others have one
MIXED = "flow gates, mixed"  # trained by all three terms: single LoRAs, their blends, and collages
ONCE_PER_PROMPT = ("prompt",)  # families without an average over time


def families() -> list[Arm]:
    """The trained gates of every family but the committed one, each followed by its controls on two concepts."""
    found = []
    for family in FAMILIES:
        for name, context in arms.CONTROLS.items():
            if family != "flow" and not (family in ONCE_PER_PROMPT and name == "gates averaged"):
                label = name.replace("gates", family if name != "gates" else f"{family} gates")
                arm = arms.gated(label, arms.gates_of(WORK / "gates" / family), context=context)
                found.append(arm if name == "gates" else _on_two(arm))
    return found


def _on_two(arm: Arm) -> Arm:
    """The arm on cases of two concepts: on three, the gates that it would control show nothing."""
    return replace(arm, covers=lambda case: len(case.concepts) == 2 and arm.covers(case))


def gates_beside_idle_loras(world) -> Arm:
    """The committed gates, and for cases with idle LoRAs those that were trained beside them."""
    alone, beside = arms.gates_of(world.folder / "gates"), arms.gates_of(WORK / "gates" / "crowded")
    return arms.gated("gates", lambda case: beside(case) if case.idle else alone(case))


def unseen() -> Arm:
    """Retrieval gates on LoRAs that they were not trained with."""
    arm = arms.gated("unseen", lambda case: WORK / "unseen")
    return replace(arm, covers=lambda case: not set(case.experts) & set(UNSEEN) and arm.covers(case))


def joint() -> Arm:
    """One LoRA per case that was trained on all its concepts; it takes no strengths of concepts."""

    def path(case: Case) -> Path:
        return WORK / "joint" / f"{name_of(case.concepts)}.safetensors"

    def draws(setup: Setup, case: Case):
        if setup.strengths:
            raise ValueError(f"the joint LoRA is one file, which cannot take strengths of {sorted(setup.strengths)}")
        return arms.attached_to(setup, {"joint LoRA": path(case)}, "sum")

    def settings(setup: Setup, case: Case) -> dict[str, str]:
        return {"file": digest_files(path(case))}

    return Arm("joint LoRA", draws, settings, covers=lambda case: path(case).exists())


def all_arms(world, setup: Setup, weights: arms.ByKind | None = None, *, validation: bool = False) -> list[Arm]:
    """Arms that need no training, the trained gates, and the ceilings; `weights` are those that a search found."""
    committed = WORK / "gates" / "flow" if validation else world.folder / "gates"
    return [
        *arms.chosen_arms(arms.ARMS, setup, committed, weights=weights),
        *families(),
        arms.gated(BLENDED, arms.gates_of(WORK / "gates" / "blend")),
        arms.gated(MIXED, arms.gates_of(WORK / "gates" / "mixed")),
        arms.gated(PROMPTED, arms.gates_of(WORK / "gates" / "prompts")),
        unseen(),
        *(arms.gated(f"{family} oracle", arms.gates_of(WORK / "oracle" / family)) for family in FAMILIES),
        joint(),
    ]
