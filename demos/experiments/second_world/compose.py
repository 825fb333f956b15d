"""How well LoRAs are composed without training: the sum, binding part by part, and one LoRA trained on all concepts.

    python demos/experiments/second_world/compose.py [--split validation] [--per-kind 6] [--seeds 8] [--kinds ...]

Rows are appended below work/compose/, so a cut-off run goes on. The joint LoRA is drawn where `check_world.py --rows joint`
has made one.
"""

import argparse
from pathlib import Path

import torch
import train_base
import words
from check_world import joint_file, lora_file
from compositions import SPLITS, JudgeMetrics, cases, squares
from drawings import default_folder
from judge import Judge
from loop import WORK, device, small_attention
from sampling import GUIDANCE, STEPS

from mole_diffusers.binding.config import Bound
from mole_diffusers.evaluation import arms
from mole_diffusers.evaluation.rows import Rows, digest_files
from mole_diffusers.evaluation.runner import Arm, Case, Setup, evaluate
from mole_diffusers.evaluation.tables import as_frame, paired_table, success_table
from mole_diffusers.lora import read_expert

SEEDS = {"test": 1000, "validation": 3000}  # the first of each split's


def given(setup: Setup, case: Case, words: bool) -> dict[str, object]:
    """A subject's place as a user would say it, with its own words or with every word."""
    subjects = [name for name in case.concepts if name not in setup.styles]
    boxes = dict(zip(subjects, squares(case), strict=False)) if len(subjects) > 1 else {}
    if words:
        return {name: (None, box) for name, box in boxes.items()}
    return {name: Bound((), boxes.get(name, "everywhere")) for name in case.concepts}


def joint() -> Arm:
    """One LoRA per case that was trained on all its concepts."""
    return Arm(
        "joint LoRA",
        lambda setup, case: arms.attached_to(setup, {"joint LoRA": joint_file(case.concepts)}, "sum"),
        lambda setup, case: {"file": digest_files(joint_file(case.concepts))},
        covers=lambda case: joint_file(case.concepts).exists(),
    )


ARMS = {
    "base": arms.base,
    "sum": arms.summed,
    "words only": arms.words_only,
    "places only": lambda: arms.bound("places only", lambda setup, case: given(setup, case, words=False)),
    "words and given places": lambda: arms.bound(
        "words and given places", lambda setup, case: given(setup, case, words=True)
    ),
    "bound": arms.bound,
    "joint LoRA": joint,
}


def setup() -> Setup:
    """The base with every LoRA of the world that exists."""
    files = {c: lora_file(c) for c in (*words.HELD_OUT_SUBJECTS, *words.HELD_OUT_STYLES) if lora_file(c).exists()}
    experts = {name: read_expert(path, name) for name, path in files.items()}
    base = f"second world {digest_files(train_base.weights_file())}"
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return Setup(train_base.trained(), experts, options, base, styles=frozenset(experts) & frozenset(words.STYLES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--kinds", nargs="*", choices=SPLITS["test"], default=list(SPLITS["test"]))
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--per-kind", type=int, default=6, help="compositions of each kind")
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    found = cases({kind: SPLITS[args.split][kind][: args.per_kind] for kind in args.kinds})
    world = setup()
    metrics = JudgeMetrics(Judge.load(default_folder() / "judge"), {(case.prompt, case.size): s for case, s in found})
    drawn = [case for case, _ in found if set(case.concepts) <= set(world.experts)]
    first = SEEDS[args.split]
    with small_attention(), torch.autocast(device().type, torch.bfloat16):
        rows = evaluate(
            world,
            [ARMS[name]() for name in args.arms],
            drawn,
            metrics,
            seeds=range(first, first + args.seeds),
            rows=Rows(Path(WORK / "compose" / args.split)),
        )
    table = as_frame(rows)
    print(success_table(table))
    if "sum" in args.arms and len(args.arms) > 1:
        print(paired_table(table, "sum"))


if __name__ == "__main__":
    main()
