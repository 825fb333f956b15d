"""How well LoRAs are composed without training: the sum, binding part by part, what others do, and one LoRA trained on all.

    python demos/experiments/emoji/compose.py [--split validation] [--per-kind 6] [--seeds 8] [--kinds ...] [--arms ...]
    python demos/experiments/emoji/compose.py --figure docs/bind.png

Rows are appended below work/compose/, so a cut-off run goes on. The joint LoRA is drawn where `check_world.py --rows joint`
has made one.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from check_world import joint_file
from loop import WORK, device, mixed_precision, small_attention
from PIL import Image
from sampling import GUIDANCE, STEPS

from mole_diffusers import attach, detach
from mole_diffusers.binding.config import Bound
from mole_diffusers.emoji import TEST, VALIDATION, scene_in
from mole_diffusers.emoji.world import EmojiWorld, emoji_world
from mole_diffusers.evaluation import arms, emoji_protocol
from mole_diffusers.evaluation.regional_composers import Part
from mole_diffusers.evaluation.rows import Rows, digest_files
from mole_diffusers.evaluation.runner import Arm, Case, Setup, evaluate
from mole_diffusers.evaluation.tables import as_frame, paired_table, success_table
from mole_diffusers.inspection.compare import image_grid, sample
from mole_diffusers.inspection.layout_figure import overlay

SPLITS = {"test": TEST, "validation": VALIDATION}
SEEDS = {"test": 1000, "validation": 3000}  # the first of each split's


def given(setup: Setup, case: Case, words: bool) -> dict[str, object]:
    """A subject's place as a user would say it, with its own words or with every word."""
    subjects = [name for name in case.concepts if name not in setup.styles]
    boxes = dict(zip(subjects, emoji_protocol.squares(case), strict=False)) if len(subjects) > 1 else {}
    if words:
        return {name: (None, box) for name, box in boxes.items()}
    return {name: Bound((), boxes.get(name, "everywhere")) for name in case.concepts}


def parts(setup: Setup, case: Case) -> dict[str, Part]:
    """A prompt that names a subject alone and its square, for each subject."""
    scene, squares = scene_in(case.prompt), emoji_protocol.squares(case)
    subjects = arms.subjects_of(setup, case)
    return {name: (replace(scene, subjects=(name,)).caption, box) for name, box in zip(subjects, squares, strict=False)}


def in_file(name: str, file: Callable[[Case], Path]) -> Arm:
    """One ordinary LoRA of all concepts of a case, where its file is there."""
    return Arm(
        name,
        lambda setup, case: arms.attached_to(setup, {name: file(case)}, "sum"),
        lambda setup, case: {"file": digest_files(file(case))},
        covers=lambda case: file(case).exists(),
    )


ARMS = {
    **arms.PLAIN,
    **{method: partial(arms.merged, method) for method in arms.MERGES},
    "places only": lambda: arms.bound("places only", lambda setup, case: given(setup, case, words=False)),
    "words and given places": lambda: arms.bound(
        "words and given places", lambda setup, case: given(setup, case, words=True)
    ),
    "regional prompts": lambda: arms.regional(parts),
    "masked blend, given places": lambda: arms.blended("masked blend, given places", parts),
    "joint LoRA": lambda: in_file("joint LoRA", lambda case: joint_file(case.concepts)),  # trained on all of them
}
OF_BINDING = ("sum", "words only", "places only", "words and given places", "bound", "tiles", "joint LoRA")


def figure(world: EmojiWorld, path: Path) -> None:
    """Three pairs of the test at its first seed: plain sum, bound, the regions over the bound picture, true drawing."""
    cells, labels = [], []
    for concepts in TEST["two subjects"][:6:2]:  # drawn on wide canvases
        index = TEST["two subjects"].index(concepts)
        scene = emoji_protocol.scene_of(concepts, index)
        call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "width": scene.size[0], "height": scene.size[1]}
        mixture = attach(world.pipe, {name: world.loras[name] for name in concepts})
        with mixture.bound(None):
            (plain,) = sample(world.pipe, scene.caption, [SEEDS["test"]], **call)
        (bound,) = sample(world.pipe, scene.caption, [SEEDS["test"]], **call)
        cells.append([plain, bound, overlay(bound, mixture.layouts[0], side=256), world.drawings.picture(scene)])
        labels.append(" + ".join(concepts))
        detach(world.pipe)
    page = image_grid(cells, ["plain sum", "bound", "regions", "true drawing"], labels)
    page.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)  # which keeps it small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--kinds", nargs="*", choices=TEST, default=list(TEST))
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=OF_BINDING)
    parser.add_argument("--per-kind", type=int, default=6, help="compositions of each kind")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the figure of docs/bind.md instead")
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    if args.figure:
        figure(world, args.figure)
        return
    found = emoji_protocol.cases({kind: SPLITS[args.split][kind][: args.per_kind] for kind in args.kinds})
    setup = emoji_protocol.setup(world, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE})
    metrics = emoji_protocol.JudgeMetrics(world.judge(), {(case.prompt, case.size): scene for case, scene in found})
    first = SEEDS[args.split]
    with small_attention(), mixed_precision():
        rows = evaluate(
            setup,
            [ARMS[name]() for name in args.arms],
            [case for case, _ in found],
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
