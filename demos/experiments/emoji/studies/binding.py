"""docs/bind.md: what binding LoRAs to their words and places does, part by part, and a figure of the regions found.

    python demos/experiments/emoji/studies/binding.py [draw] [report]

Draws the bound arms on the test's compositions. The sum, trained gates and the joint LoRA are rows of `evaluate.py test`,
which have the same noise. Rows are appended under work/evaluation/binding and packed in rows/; none is made twice.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "training"))

import pandas as pd
from evaluate import DOCS, FOLDER, OPTIONS, SEEDS
from kept_rows import KEPT, pack, unpacked
from loop import WORK, device, in_bf16
from pages import fill
from report import named, of_cases, ordered

from mole_diffusers import attach, detach, emoji, emoji_world
from mole_diffusers.binding.config import Bound
from mole_diffusers.evaluation import arms, emoji_protocol, tables
from mole_diffusers.evaluation.rows import Rows
from mole_diffusers.evaluation.runner import Arm, Case, Setup, add_idle_experts, evaluate
from mole_diffusers.inspection.compare import image_grid, sample
from mole_diffusers.inspection.layout_figure import overlay

PART = 8  # compositions of each kind
SHOWN = ("sunflower", "crocodile"), ("doughnut", "tiger"), ("crocodile", "honeybee")
FROM_TEST = ("sum", "gates", "joint LoRA")
TRAINED_BOUND = "bound gates, trained bound"
ORDER = (
    "sum", "words only", "places only", "words and given places", "bound", "gates", "bound gates", TRAINED_BOUND,
    "joint LoRA",
)  # fmt: skip
STRANGERS = 2


def thirds(count: int) -> list[tuple[float, float, float, float]]:
    """Where this world's subjects stand: side by side, in the order of the prompt."""
    return [(i / count, 0.0, (i + 1) / count, 1.0) for i in range(count)]


def given(setup: Setup, case: Case, words: bool) -> dict[str, object]:
    """A subject's place as a user would say it, with its own words or with every word."""
    subjects = [name for name in case.concepts if name not in setup.styles]
    boxes = dict(zip(subjects, thirds(len(subjects)), strict=True)) if len(subjects) > 1 else {}
    if words:
        return {name: (None, box) for name, box in boxes.items()}
    return {name: Bound((), boxes.get(name, "everywhere")) for name in case.concepts}


def study_arms(world) -> list[Arm]:
    """The parts of binding, and the whole."""
    return [
        arms.words_only(),
        arms.bound("places only", lambda setup, case: given(setup, case, words=False)),
        arms.bound("words and given places", lambda setup, case: given(setup, case, words=True)),
        arms.bound(),
        arms.bound_gates(arms.gates_of(world.folder / "gates")),
        replace(arms.bound_gates(arms.gates_of(WORK / "gates" / "bound")), name=TRAINED_BOUND),
    ]


def study_cases() -> list[tuple[Case, emoji.Scene]]:
    """The first compositions of each kind of the test."""
    found = emoji_protocol.cases(emoji.TEST)
    kinds = dict.fromkeys(case.kind for case, _ in found)
    return [pair for kind in kinds for pair in [p for p in found if p[0].kind == kind][:PART]]


def draw(world, rows: Rows) -> None:
    """Every arm on every case; and two subjects beside LoRAs that the prompt does not name."""
    setup, cases = emoji_protocol.setup(world, OPTIONS), study_cases()
    metrics = emoji_protocol.JudgeMetrics(world, {case.prompt: scene for case, scene in cases})
    evaluate(setup, study_arms(world), [case for case, _ in cases], metrics, seeds=SEEDS, rows=rows)
    pairs = [case for case, _ in cases if case.kind == "subject + subject"]
    crowded = add_idle_experts(pairs, emoji.TEST_SUBJECTS, [2 + STRANGERS])
    evaluate(setup, [arms.summed(), arms.bound()], crowded, metrics, seeds=SEEDS, rows=rows)


def figure(world, path: Path) -> None:
    """Three pairs: the plain sum, bound, and the regions over the bound picture."""
    cells, labels = [], []
    for subjects in SHOWN:
        scene = emoji.Scene(subjects, "noto", "blue")
        mixture = attach(world.pipe, {name: world.loras[name] for name in subjects})
        with mixture.bound(None):
            plain = sample(world.pipe, scene.caption, [SEEDS[0]], **OPTIONS)[0]
        bound = sample(world.pipe, scene.caption, [SEEDS[0]], **OPTIONS)[0]
        cells.append([plain, bound, overlay(bound, mixture.layouts[0], side=192), world.drawings.picture(scene)])
        labels.append(" + ".join(subjects))
        detach(world.pipe)
    image_grid(cells, ["plain sum", "bound", "regions", "true drawing"], labels, cell=192).save(path)


def document(test: pd.DataFrame, bound: pd.DataFrame) -> str:
    """bind.md, from the rows of the test and of this study."""
    wanted = [case.concepts for case, _ in study_cases()]
    alone = bound[bound["idle"].str.len() == 0]
    both = pd.concat([of_cases(named(test, FROM_TEST), wanted), alone])
    both = both.sort_values("arm", key=lambda column: column.map(ORDER.index), kind="stable")
    pairs = both[(both["kind"] == "subject + subject") & both["arm"].isin(["sum", "bound"])]
    crowd = pd.concat([pairs, bound[bound["idle"].str.len() > 0]])
    parts = {
        "success": tables.success_table(both),
        "paired": tables.paired_table(both, "sum"),
        "strict": tables.paired_table(
            named(both, ("sum", "bound", "bound gates", TRAINED_BOUND)), "sum", resample="concepts"
        ),
        "crowd": tables.success_table(crowd),
    }
    return fill((KEPT.parent / "bind_text.md").read_text(), parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", default=["draw", "report"], help="of draw, report; default: both")
    steps = parser.parse_args().steps
    if unknown := set(steps) - {"draw", "report"}:
        parser.error(f"unknown {sorted(unknown)}; known: ['draw', 'report']")
    world, rows = emoji_world(device=str(device())), Rows(unpacked(FOLDER / "binding"))
    in_bf16(world.pipe.unet)
    if "draw" in steps:
        draw(world, rows)
    if "report" in steps:
        pack(rows, "binding")
        figure(world, DOCS / "bind.png")
        test = ordered(Rows(unpacked(FOLDER / "test")).read())
        (DOCS / "bind.md").write_text(document(test, ordered(rows.read())))


if __name__ == "__main__":
    main()
