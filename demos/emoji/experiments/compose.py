"""Measure how well LoRAs compose without training: the sum, parts of binding, other methods, and one LoRA trained on all.

    python demos/emoji/experiments/compose.py [--split validation] [--per-kind 6] [--seeds 8] [--kinds ...] [--methods ...]
    python demos/emoji/experiments/compose.py --split larger --per-kind 8
    python demos/emoji/experiments/compose.py --concepts dragon violin bus rose aurora
    python demos/emoji/experiments/compose.py --figure tiles
    python demos/emoji/experiments/compose.py --search --seeds 2

Rows are appended below work/compose/, so you can continue an interrupted run. The split "larger" has compositions of three
and four test subjects. `--concepts` composes subjects and styles that are in no split; first make their LoRAs with
`make_loras.py`. Trained gates are included if `train_gates.py --gate_type FAMILY --to work/gates/FAMILY` has made them,
MoLE in the form of its paper if `train_gates.py --gate_type outputs --unbound --to work/paper` has, and the joint LoRA if
`joint_lora.py` has.
`--search` finds the strengths of the method "grid search" on validation compositions. `--pack` also writes the verdicts to
docs/results/, from which docs/make_results.py makes the tables in the documents.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from joint_lora import joint_file
from loop import WORK, device, mixed_precision, small_attention
from packing import pack
from PIL import Image
from sampling import GUIDANCE, STEPS

from mole_diffusers import Mixture, attach, detach
from mole_diffusers.binding import Bound
from mole_diffusers.inspection import image_grid, overlay, sample
from mole_diffusers.training import cells
from mole_world import TEST, VALIDATION, Scene, scene_in, words
from mole_world.compositions import LARGER, compositions
from mole_world.evaluation import emoji_protocol, methods
from mole_world.evaluation.plots import bars
from mole_world.evaluation.rows import Row, Rows, digest_files, picture_path
from mole_world.evaluation.runner import Case, Method, Metrics, Setup, evaluate
from mole_world.evaluation.strength_search import best_weights, read_weights, search_methods
from mole_world.evaluation.tables import as_frame, success_table
from mole_world.world import EmojiWorld, emoji_world

rivals = methods.imported(Path(__file__).parents[1] / "rivals")
DOCS = Path(__file__).parents[3] / "docs"
STRENGTHS = DOCS / "results" / "strengths.json"  # from a grid search: the best on validation, by kind
GRID = (0.6, 0.8, 1.0, 1.2)
GATE_TYPES = ("factors", "mole", "flow")  # of gates that are trained on top of the default
SPLITS = {"test": TEST, "validation": VALIDATION}
# The first seed of each split; "other" means concepts of no split.
SEEDS = {"test": 1000, "validation": 3000, "larger": 1000, "other": 5000}


def given(setup: Setup, case: Case, words: bool) -> dict[str, object]:
    """A place for each subject as a user would give it, with its own words or (`words`) with every word."""
    subjects = methods.subjects_of(setup, case)
    boxes = dict(zip(subjects, cells(len(subjects), *case.size), strict=True)) if len(subjects) > 1 else {}
    if words:
        return {name: (None, box) for name, box in boxes.items()}
    return {name: Bound((), boxes.get(name, "everywhere")) for name in case.concepts}


def parts(setup: Setup, case: Case) -> dict[str, Any]:
    """For each subject: a prompt that names only this one, and its square."""
    scene = scene_in(case.prompt)
    boxes = zip(scene.subjects, cells(len(scene.subjects), *case.size), strict=True)
    return {name: (replace(scene, subjects=(name,)).caption, box) for name, box in boxes}


def in_file(name: str, file: Callable[[Case], Path], *, by_words: bool = False) -> Method:
    """One ordinary LoRA for all concepts of a case, if its file exists. `by_words` binds it to each, to draw in tiles."""

    def draws(setup: Setup, case: Case) -> AbstractContextManager[Mixture]:
        binding = {name: list(case.concepts)} if by_words else None
        return methods.attached_to(setup, {name: file(case)}, "sum", binding)

    return Method(
        name,
        draws,
        lambda setup, case: {"file": digest_files(file(case))},
        covers=lambda case: file(case).exists(),
    )


def own_methods() -> list[Method]:
    """Methods that are told more than a prompt, are trained elsewhere, or have another setting."""
    return [
        methods.in_tiles("tiles from the first step", since=0),
        methods.bound("places only", lambda setup, case: given(setup, case, words=False)),
        methods.bound("words and given places", lambda setup, case: given(setup, case, words=True)),
        rivals.regional(parts),
        rivals.isolated_regional(parts),
        methods.weighted(
            "bound, isolation until half",
            binding=lambda setup, case: given(setup, case, words=True),
            context=lambda setup, case, _: rivals.isolated(setup.pipe, [box for _, box in parts(setup, case).values()]),
            until=rivals.UNTIL,
        ),
        # The paper has 100 steps, we 20: turns and tail a fifth as long.
        rivals.w_switch("w-switch, short turns", period=1, tail=1),
        rivals.patchwise("loratorio, sharp", temperature=0.02),
        rivals.blended("masked blend, given places", parts),
        rivals.blended("masked blend, given places, tiles' steps", parts, since=0.4, until=methods.UNTIL),
        *(
            methods.in_tiles(f"tiles, {gate_type} gates", gates=methods.gates_of(WORK / "gates" / gate_type))
            for gate_type in GATE_TYPES
        ),
        methods.weighted(
            "bound, factors gates", gates=methods.gates_of(WORK / "gates" / "factors"), binding=methods.from_files
        ),
        methods.weighted("MoLE, the paper's form", gates=methods.gates_of(WORK / "paper")),
        in_file("joint LoRA", lambda case: joint_file(case.concepts)),  # trained on all of them
        in_file("joint LoRA, tiles", lambda case: joint_file(case.concepts), by_words=True),
    ]


METHODS = methods.METHODS | rivals.METHODS | {method.name: method for method in own_methods()}
OF_BINDING = (
    "sum",
    "words only",
    "places only",
    "words and given places",
    "bound",
    "tiles",
    "joint LoRA",
    "joint LoRA, tiles",
)


def measured(
    setup: Setup, drawn: Sequence[Method], found: Sequence[tuple[Case, Scene]], metrics: Metrics, *, seeds: range, rows: Rows
) -> list[Row]:
    """A row per picture of these compositions by these methods. Missing pictures are drawn."""
    with small_attention(), mixed_precision():
        return evaluate(setup, drawn, [case for case, _ in found], metrics, seeds=seeds, rows=rows)


def side_by_side(world: EmojiWorld, kind: str, index: int, *, joint: bool) -> tuple[dict[str, Image.Image], str]:
    """A test composition at its first seed, in several ways and as the true drawing; and its name.

    Args:
        joint: use the joint LoRA, which was trained on all its concepts, instead of a LoRA per concept.
    """
    concepts = (TEST | LARGER)[kind][index]
    experts = {"joint": joint_file(concepts)} if joint else {name: world.loras[name] for name in concepts}
    scene = emoji_protocol.scene_of(kind, concepts, index)
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "width": scene.size[0], "height": scene.size[1]}
    mixture = attach(world.pipe, experts, binding={"joint": list(concepts)} if joint else "auto")
    seeds = [SEEDS["test"]]
    with mixture.bound(None):
        (plain,) = sample(world.pipe, scene.caption, seeds, **call)
    with mixture.tiled(0):
        (bound,) = sample(world.pipe, scene.caption, seeds, **call)
    regions = overlay(bound, mixture.layouts[0], side=256)
    with mixture.tiled():
        (tiles,) = sample(world.pipe, scene.caption, seeds, **call)
    detach(world.pipe)
    true = world.drawings.picture(scene)
    pictures = {
        "everywhere" if joint else "plain sum": plain,
        "bound": bound,
        "regions": regions,
        "tiles": tiles,
        "true drawing": true,
    }
    return pictures, " +\n".join(concepts)


def sheet_of(verdicts: Sequence[Row], rows: Rows, path: Path) -> None:
    """The pictures of the first seed: a row per composition, a column per method."""
    methods_drawn = list(dict.fromkeys(row["method"] for row in verdicts))
    found = {
        (row["kind"], row["case"], row["method"]): Image.open(picture_path(rows.folder, row))
        for row in verdicts
        if row["seed"] == min(each["seed"] for each in verdicts)
    }
    drawn = list(dict.fromkeys((kind, case) for kind, case, _ in found))
    cells = [[found[kind, case, method] for method in methods_drawn] for kind, case in drawn]
    page = image_grid(cells, methods_drawn, [case.rpartition(" ")[0].replace("+", " +\n") for _, case in drawn], cell=144)
    page.quantize(256).save(path, optimize=True)


def draw_asked(args: argparse.Namespace, table: pd.DataFrame, verdicts: Sequence[Row], rows: Rows) -> None:
    """The sheet and the chart, if they are asked for."""
    if args.sheet:
        sheet_of(verdicts, rows, args.sheet)
    if args.chart:
        bars(table, args.chart)


FIGURES = {  # figure -> its compositions by kind and index, and its columns
    "bind": (
        (("two subjects", 0), ("two subjects", 2), ("two subjects", 4)),  # drawn on wide canvases
        ("plain sum", "bound", "regions", "true drawing"),
    ),
    "tiles": (
        (("two subjects + style", 8), ("three subjects", 0), ("four subjects + style", 0)),
        ("plain sum", "bound", "tiles", "true drawing"),
    ),
    "joint": (
        (("three subjects", 0), ("two subjects", 0), ("two subjects + style", 0)),
        ("everywhere", "bound", "tiles", "true drawing"),
    ),
}


def figure(world: EmojiWorld, name: str, path: Path) -> None:
    """Draw one of FIGURES."""
    found, columns = FIGURES[name]
    rows = [side_by_side(world, *each, joint=name == "joint") for each in found]
    cells = [[pictures[column] for column in columns] for pictures, _ in rows]
    page = image_grid(cells, columns, [label for _, label in rows], cell=256)
    page.quantize(256).save(path, optimize=True)  # to keep the file small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SEEDS, default="validation")
    parser.add_argument("--concepts", nargs="+", metavar="NAME", help='compose these instead, as split "other"')
    parser.add_argument("--kinds", nargs="*", choices=TEST | LARGER, help="default: all in the split")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=OF_BINDING)
    parser.add_argument("--per-kind", type=int, default=6, help="compositions of each kind")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--figure", choices=FIGURES, help="draw that picture of docs/ instead")
    parser.add_argument("--pack", action="store_true", help="write the verdicts to docs/results/, too")
    parser.add_argument("--search", action="store_true", help="find the sum's best strengths for each kind, on validation")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="put the first seed of each composition on a sheet, too")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw success by kind, too")
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    if args.figure:
        figure(world, args.figure, DOCS / f"{args.figure}.png")
        return
    if args.search:
        args.split = "validation"
    if args.concepts:
        args.split = "other"
        subjects, styles = ([name for name in args.concepts if name in known] for known in (words.SUBJECTS, words.STYLES))
        split = compositions(subjects, styles, dict.fromkeys(args.kinds or TEST, args.per_kind))
    elif args.split == "other":
        parser.error("split other needs --concepts")
    else:
        split = {**SPLITS, "larger": LARGER}[args.split]
    if others := set(args.kinds or ()) - set(split):
        parser.error(f"split {args.split} has no {sorted(others)}, but {list(split)}")
    found = emoji_protocol.cases({kind: split[kind][: args.per_kind] for kind in args.kinds or split})
    told = {"gates": WORK / "gates", "searched": read_weights(STRENGTHS)}
    setup = emoji_protocol.setup(world, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}, **told)
    seeds, rows = range(SEEDS[args.split], SEEDS[args.split] + args.seeds), Rows(WORK / "compose" / args.split)
    drawn, lacking = (
        (search_methods(setup, GRID), []) if args.search else methods.chosen_methods(args.methods, setup, known=METHODS)
    )
    if lacking:
        parser.error("; ".join(lacking))
    metrics = emoji_protocol.JudgeMetrics(world.judge(), world.drawings, found)
    verdicts = measured(setup, drawn, found, metrics, seeds=seeds, rows=rows)
    table = as_frame(verdicts)
    print(success_table(table))
    if args.search:
        STRENGTHS.write_text(json.dumps(best_weights(verdicts), indent=1) + "\n")
        return
    if args.pack:
        pack(args.split, table, ["kind", "concepts", "method", "seed"], measured=("success", "another"))
    draw_asked(args, table, verdicts, rows)
    if "sum" in args.methods and len(args.methods) > 1:
        print(success_table(table, against="sum"))


if __name__ == "__main__":
    main()
