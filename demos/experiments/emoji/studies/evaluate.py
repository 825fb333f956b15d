"""Judge the world and every composer on it, and write the tables and figures of docs/results.md.

    python demos/experiments/emoji/studies/evaluate.py [world] [search] [validation] [test] [moved] [crowded] [report]

`search` looks for the best strengths on the validation split; the arm "grid search" of the other steps has them. `moved`
follows subject and style as strength goes from one to the other, `crowded` attaches experts that no prompt asks for.

Rows are appended under work/evaluation/; rows that exist, those packed in rows/ too, are not made again.
`accelerate launch` divides the work.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "training"))

from accelerate import PartialState
from compose import COMPARED_PAIRS, crowd
from composers import all_arms, gates_beside_idle_loras
from kept_rows import KEPT, unpacked
from loop import WORK, device, in_bf16, note
from train_judge import accuracy

from mole_diffusers import emoji, emoji_world
from mole_diffusers.evaluation import arms, emoji_protocol
from mole_diffusers.evaluation.rows import Rows
from mole_diffusers.evaluation.runner import Case, evaluate
from mole_diffusers.evaluation.strength_search import best_weights, search_arms
from mole_diffusers.inspection.gate_figures import block_places, heat_map
from mole_diffusers.studio.block_weights import block_names

SEEDS = range(1000, 1008)
VALIDATION_SEEDS = range(2000, 2004)
CHOOSING_SEEDS = range(2000, 2008)  # of the validation that chooses the default
OPTIONS = {"num_inference_steps": 12, "guidance_scale": 3.0}  # 20 steps show no more, see docs/results.md
FOLDER = WORK / "evaluation"
SPLITS = {
    "search": (emoji.VALIDATION, VALIDATION_SEEDS),
    "validation": (emoji.VALIDATION, CHOOSING_SEEDS),
    "test": (emoji.TEST, SEEDS),
    "moved": ({"subject x style": emoji.COMPARED[:8]}, SEEDS[:4]),
    "crowded": (COMPARED_PAIRS, SEEDS[:4]),
}
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)  # of the strength that is the style's
DOCS = Path(__file__).parents[4] / "docs"


def world_cases() -> list[tuple[Case, emoji.Scene, str | None]]:
    """(case, scene, the expert that draws it or None for the base) for the world's own table."""
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
    cases, setup = world_cases(), emoji_protocol.setup(world, OPTIONS)
    metrics = emoji_protocol.JudgeMetrics(world, {case.prompt: scene for case, scene, _ in cases})
    for arm in (arms.base(), *map(arms.alone, setup.experts)):
        own = [case for case, _, concept in cases if arm.name == (f"alone {concept}" if concept else "base")]
        evaluate(setup, [arm], own, metrics, seeds=SEEDS[:4], rows=rows, processes=processes)


def searched_weights() -> dict[str, dict[str, float]] | None:
    """What the search found, if it was run."""
    rows = Rows(unpacked(FOLDER / "search")).read()
    return best_weights(rows) if rows else None


def wanted(world, setup, name: str) -> list[arms.Arm]:
    """The arms of one step."""
    if name == "search":
        return search_arms(setup)
    if name == "moved":
        return arms.moved_arms(["sum", "np", "gates"], setup, world.folder / "gates", shares=SHARES)
    if name == "crowded":
        return [*arms.chosen_arms(["sum", "mean", "svd", "np", "switch"], setup), gates_beside_idle_loras(world)]
    return all_arms(world, setup, searched_weights(), validation=name == "validation")


def run_split(world, name: str, process: int, processes: int) -> None:
    """The arms of a step on its compositions; of the validation split the first four of each kind."""
    split, seeds = SPLITS[name]
    found, rows = emoji_protocol.cases(split), Rows(unpacked(FOLDER / name), process)
    metrics = emoji_protocol.JudgeMetrics(world, {case.prompt: scene for case, scene in found})
    setup, cases = emoji_protocol.setup(world, OPTIONS), [case for case, _ in found]
    if split is emoji.VALIDATION:
        cases = [case for case in cases if case.concepts in emoji.VALIDATED]
    if name == "crowded":
        cases = crowd()
    evaluate(setup, wanted(world, setup, name), cases, metrics, seeds=seeds, rows=rows, processes=processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = ["world", *SPLITS, "report"]
    parser.add_argument("what", nargs="*", default=steps, help=f"of {steps}; default: all")
    what = parser.parse_args().what
    if unknown := set(what) - set(steps):
        parser.error(f"unknown {sorted(unknown)}; known: {steps}")
    state = PartialState(cpu=device().type == "cpu")
    world, number, processes = emoji_world(device=str(device())), state.process_index, state.num_processes
    in_bf16(world.pipe.unet)
    if "world" in what:
        run_world(world, Rows(unpacked(FOLDER / "world"), number), processes)
        if state.is_main_process:
            clean, soft = (accuracy(world.drawings, world.judge(), vae, 99) for vae in (None, world.pipe.vae))
            note("judge, share right", drawings=clean, through_autoencoder=soft)
    for name in SPLITS:
        if name in what:
            run_split(world, name, number, processes)
            state.wait_for_everyone()
    if "report" in what and state.is_main_process:
        report(world)


def report(world) -> None:
    """Write docs/results.md and its figures, from the rows that exist."""
    from report import SHOWN, write

    took = json.loads((KEPT / "took.json").read_text())
    write({part: Rows(unpacked(FOLDER / part)) for part in ("world", *SPLITS)}, took, DOCS)
    shown = next(case for case, _ in emoji_protocol.cases(emoji.TEST) if case.name == SHOWN)
    gates = arms.gated("gates", arms.gates_of(world.folder / "gates"))
    trace = arms.traced(emoji_protocol.setup(world, OPTIONS), gates, shown)
    heat_map(trace, block_places(trace, block_names(world.pipe.unet))).save(DOCS / "heat_map.png")


if __name__ == "__main__":
    main()
