"""Judge the world and every composer on it, and write the tables and figures of docs/results.md.

    python demos/emoji/evaluate.py [world] [validation] [test] [report]

Rows are appended under work/evaluation/, and rows that exist are not made again. `accelerate launch` divides the work.
"""

import argparse
import json
from pathlib import Path

from accelerate import PartialState
from arms import all_arms
from loop import WORK, device

from mole_diffusers import emoji, emoji_world
from mole_diffusers.evaluation import arms, emoji_protocol
from mole_diffusers.evaluation.rows import Rows
from mole_diffusers.evaluation.runner import Case, evaluate

SEEDS = range(1000, 1008)
VALIDATION_SEEDS = range(2000, 2004)
OPTIONS = {"num_inference_steps": 20, "guidance_scale": 3.0}
FOLDER = WORK / "evaluation"
DOCS = Path(__file__).parent.parent.parent / "docs"


def world_cases() -> list[tuple[Case, emoji.Scene, str | None]]:
    """(case, scene, the expert that draws it) of everything the world's own report needs."""
    styles, subjects = emoji.BASE_STYLES, emoji.BASE_SUBJECTS
    scenes = [("base", None, emoji.Scene((s,), styles[i % len(styles)])) for i, s in enumerate(subjects)]
    for concept in emoji.HELD_OUT_SUBJECTS:
        for i in range(4):  # 4 styles x 4 seeds
            scenes.append(("subject", concept, emoji.Scene((concept,), styles[(i + len(concept)) % len(styles)])))
    for concept in emoji.HELD_OUT_STYLES:
        for i in range(4):
            scenes.append(("style", concept, emoji.Scene((subjects[(7 * i + 5 * len(concept)) % len(subjects)],), concept)))
    return [(Case((c,) if c else s.subjects, kind, s.caption), s, c) for kind, c, s in scenes]


def run_world(world, rows: Rows, processes: int) -> None:
    """The base on what it knows, and each LoRA alone on what it teaches."""
    cases, bench = world_cases(), emoji_protocol.bench(world)
    look = emoji_protocol.Look(world, {case.prompt: scene for case, scene, _ in cases})
    for arm in (arms.base(), *map(arms.alone, bench.experts)):
        own = [case for case, _, concept in cases if arm.name == (f"alone {concept}" if concept else "base")]
        evaluate(bench, [arm], own, look, seeds=SEEDS[:4], options=OPTIONS, rows=rows, processes=processes)


def run_split(world, split, seeds, rows: Rows, processes: int) -> None:
    """Every composer on a split's compositions."""
    found = emoji_protocol.cases(split)
    look = emoji_protocol.Look(world, {case.prompt: scene for case, scene in found})
    bench, cases = emoji_protocol.bench(world), [case for case, _ in found]
    evaluate(bench, all_arms(world), cases, look, seeds=seeds, options=OPTIONS, rows=rows, processes=processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = ["world", "validation", "test", "report"]
    parser.add_argument("what", nargs="*", default=steps, help=f"of {steps}; default: all")
    what = parser.parse_args().what
    if unknown := set(what) - set(steps):
        parser.error(f"unknown {sorted(unknown)}; known: {steps}")
    state = PartialState(cpu=device().type == "cpu")
    world, number, processes = emoji_world(device=str(device())), state.process_index, state.num_processes
    if "world" in what:
        run_world(world, Rows(FOLDER / "world", number), processes)
    if "validation" in what:
        run_split(world, emoji.VALIDATION, VALIDATION_SEEDS, Rows(FOLDER / "validation", number), processes)
    if "test" in what:
        run_split(world, emoji.TEST, SEEDS, Rows(FOLDER / "test", number), processes)
    state.wait_for_everyone()
    if "report" in what and state.is_main_process:
        from report import write

        took = json.loads((WORK / "took.json").read_text())
        write({part: Rows(FOLDER / part).read() for part in ("world", "validation", "test")}, took, DOCS)


if __name__ == "__main__":
    main()
