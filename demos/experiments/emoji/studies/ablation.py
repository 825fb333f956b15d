"""Where and when LoRAs matter, and what their gates learned: maps over stages of the UNet and quarters of the steps.

    python demos/experiments/emoji/studies/ablation.py [sum] [gates] [styled] [report]

`sum` switches the LoRAs of the plain sum off in one stage during one quarter, on validation pairs of a subject and a style.
`gates` puts 1 in the place of every weight of the trained gates there, or everywhere else, on the test's pairs of subjects,
`styled` on its subjects in a style; nothing is chosen from them. `report` writes docs/ablation.md and its figures, and packs
the rows.

Rows are appended under work/ablation/; rows that exist, those packed in rows/ too, are not made again.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "training"))

import pandas as pd
from compose import COMPARED_PAIRS, name_of
from evaluate import DOCS, OPTIONS, SEEDS, VALIDATION_SEEDS
from kept_rows import KEPT, pack, unpacked
from loop import WORK, device, in_bf16
from pages import fill

from mole_diffusers import emoji, emoji_world, functional
from mole_diffusers.evaluation import arms, emoji_protocol, tables
from mole_diffusers.evaluation.plots import save_figure
from mole_diffusers.evaluation.rows import Row, Rows
from mole_diffusers.evaluation.runner import Arm, Case, Setup, evaluate
from mole_diffusers.evaluation.sampling_composers import StepCounter
from mole_diffusers.mixture import Mixture
from mole_diffusers.patching.trace import Trace

FOLDER = WORK / "ablation"
ENTROPY = KEPT / "ablation_entropy.json"
STAGES = {s: f"unet.{s}" for s in ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1")}
STAGES |= {"all stages": "unet."}  # those with attention are all that LoRAs of this world change
TEXT = "text encoder"
PREFIXES = STAGES | {TEXT: "text_encoder."}  # of the modules' names
COUNT = OPTIONS["num_inference_steps"]
TIMES = {f"{q} to {q + COUNT // 4 - 1}": range(q, q + COUNT // 4) for q in range(0, COUNT, COUNT // 4)}
TIMES |= {"all": range(COUNT)}
GRID = [(stage, time) for stage in STAGES for time in TIMES]
ALONE = [(s, t) for s, t in GRID if (s == "all stages") != (t == "all")]  # one stage all the time, one quarter everywhere
SPLITS = {
    "sum": ({"subject x style": emoji.VALIDATION["subject x style"]}, VALIDATION_SEEDS),
    "gates": (COMPARED_PAIRS, SEEDS[:4]),
    "styled": ({"subject x style": emoji.COMPARED[:8]}, SEEDS[:4]),
}


class Window:
    """A part of the pipeline during some of the steps: contains the module names of that part while sampling is there.

    A text encoder runs before the first step, which counts as the first.
    """

    def __init__(self, pipe, part: str, time: str):
        self.prefix, self.steps = PREFIXES[part], TIMES[time]
        self.now, self._counter = 0, StepCounter(pipe.unet)

    def __contains__(self, module: str) -> bool:
        return module.startswith(self.prefix) and self.now in self.steps

    def advance(self, _, args: tuple, kwargs: dict) -> None:
        self.now = self._counter.at(args, kwargs)


@dataclass
class Fixed:
    """A strength schedule: one weight for all experts inside a window or outside it, the gates' own elsewhere."""

    window: Window
    experts: int
    weight: float
    inside: bool

    def part(self, part: str) -> Sequence[float]:
        return [1.0] * self.experts

    def block(self, module: str) -> Sequence[float]:
        return [1.0] * self.experts

    def gates(self, place: str) -> Sequence[float] | None:
        return [self.weight] * self.experts if (place in self.window) == self.inside else None


def fixed(part: str, time: str, *, weight: float, inside: bool = True) -> arms.Context:
    """The context in which an attached mixture draws with `Fixed`."""

    @contextmanager
    def control(setup: Setup, case: Case, mixture: Mixture) -> Iterator[None]:
        window = Window(setup.pipe, part, time)
        hook = setup.pipe.unet.register_forward_pre_hook(window.advance, prepend=True, with_kwargs=True)
        try:
            with mixture.planned(Fixed(window, len(case.experts), weight, inside)):
                yield
        finally:
            hook.remove()

    return control


def off(part: str, time: str) -> str:
    """Name of the arm with the sum, without LoRAs there."""
    return f"sum without {part}, steps {time}"


def held(part: str, time: str) -> str:
    """Name of the arm with the gates at 1 there."""
    return f"gates at 1 in {part}, steps {time}"


def only(part: str, time: str) -> str:
    """Name of the arm with the gates at 1 everywhere else."""
    return f"gates only in {part}, steps {time}"


def wanted(world, what: str) -> list[Arm]:
    """The arms of one map. The gates at 1 in all stages are the text encoder's alone, which needs no arm of its own."""
    if what == "sum":
        cells = [*GRID, (TEXT, "all")]
        return [arms.summed(), *(arms.while_sampling(off(*cell), fixed(*cell, weight=0.0)) for cell in cells)]
    folder, cells = arms.gates_of(world.folder / "gates"), [*ALONE, ("all stages", "all")]
    return [
        arms.summed(),
        arms.gated("gates", folder),
        *(arms.gated(held(*cell), folder, context=fixed(*cell, weight=1.0)) for cell in GRID),
        *(arms.gated(only(*cell), folder, context=fixed(*cell, weight=1.0, inside=False)) for cell in cells),
    ]


def entropies(traces: Sequence[Trace]) -> dict[str, dict[str, float]]:
    """Part -> steps -> the gates' mean entropy over ln N, its maximum; layers that one expert lacks are left out."""
    recorded = [
        (name, step, (functional.entropy(weights).mean() / math.log(len(trace.experts))).item())
        for trace in traces
        for name, step, weights in trace.records
        if not name.endswith(")")
    ]

    def mean(part: str, steps: range) -> float:
        return statistics.mean(e for name, step, e in recorded if name.startswith(PREFIXES[part]) and max(step, 0) in steps)

    times = {part: TIMES if part != TEXT else {"all": TIMES["all"]} for part in PREFIXES}
    return {part: {time: mean(part, steps) for time, steps in times[part].items()} for part in PREFIXES}


def draw(world, what: Sequence[str]) -> None:
    """Make every row of these maps that does not exist yet."""
    setup, rows = emoji_protocol.setup(world, OPTIONS), Rows(unpacked(FOLDER))
    for name in what:
        split, seeds = SPLITS[name]
        found = emoji_protocol.cases(split)
        metrics = emoji_protocol.JudgeMetrics(world, {case.prompt: scene for case, scene in found})
        cases = [case for case, _ in found]
        evaluate(setup, wanted(world, name), cases, metrics, seeds=seeds, rows=rows)
        if name == "gates" and not ENTROPY.exists():
            gates = arms.gated("gates", arms.gates_of(world.folder / "gates"))
            said = entropies([arms.traced(setup, gates, case) for case in cases])
            ENTROPY.write_text(json.dumps(said, indent=1) + "\n")


Cell = Callable[[str, str], str]


def stage_table(first: str, cell: Cell) -> str:
    """A table of stages by steps."""
    head = [first, *(f"steps {time}" if time != "all" else "all steps" for time in TIMES)]
    return tables.markdown(head, [[stage, *(cell(stage, time) for time in TIMES)] for stage in STAGES])


def less(rows: pd.DataFrame, reference: pd.DataFrame) -> str:
    """Success less that of the reference on the same prompt and noise, with its interval."""
    return tables.interval(tables.subtract(rows, reference, ["success"]), "success")


def only_table(found: Mapping[str, pd.DataFrame]) -> str:
    """Success if only some gates are used, beside the sum, which uses none, and all gates."""
    named = {"none: the sum": "sum", "all": "gates"}
    named |= {stage if time == "all" else f"all stages, steps {time}": only(stage, time) for stage, time in ALONE}
    named |= {"all stages": only("all stages", "all"), TEXT: held("all stages", "all")}
    body = []
    for label, arm in named.items():
        rows = found[arm]
        body.append([label, tables.interval(rows, "success"), less(rows, found["sum"]), less(rows, found["gates"])])
    return tables.markdown(["gates kept", "success", "less the sum", "less all gates"], body)


def by_arm(rows: Sequence[Row], what: str) -> dict[str, pd.DataFrame]:
    """The rows of one map by arm, sorted, since intervals depend on the order of the rows."""
    cases = {name_of(case) for group in SPLITS[what][0].values() for case in group}
    own = sorted((row for row in rows if name_of(row["concepts"]) in cases), key=lambda row: (row["case"], row["seed"]))
    return dict(list(emoji_protocol.frame(own).groupby("arm", sort=False)))


def shares(found: Mapping[str, pd.DataFrame], arm: Cell, value: str) -> list[list[float]]:
    """Means of a value, stages x steps."""
    return [[found[arm(stage, time)][value].mean() for time in TIMES] for stage in STAGES]


def document(rows: Sequence[Row], entropy: Mapping[str, Mapping[str, float]]) -> str:
    """docs/ablation.md from the rows and the entropy of the gates."""
    sums, gates, styled = (by_arm(rows, what) for what in SPLITS)

    def seen(arm: str) -> str:
        return ", ".join(f"{name} {tables.interval(sums[arm], f'{name} seen')}" for name in ("subject", "style"))

    def switched(value: str) -> str:
        return stage_table("switched off", lambda *cell: tables.interval(sums[off(*cell)], value))

    def beside(found: Mapping[str, pd.DataFrame], arm: str) -> str:
        return f"{found[arm]['success'].mean():.2f}, {less(found[arm], found['gates'])}"

    parts = {
        "sum": seen("sum"),
        "sum_text": seen(off(TEXT, "all")),
        "sum_subject": switched("subject seen"),
        "sum_style": switched("style seen"),
        "held": stage_table("at 1", lambda *cell: beside(gates, held(*cell))),
        "held_text": beside(gates, only("all stages", "all")),
        "kept": only_table(gates),
        "styled_held": stage_table("at 1", lambda *cell: beside(styled, held(*cell))),
        "styled_held_text": beside(styled, only("all stages", "all")),
        "styled_kept": only_table(styled),
        "entropy": stage_table("gates of", lambda stage, time: f"{entropy[stage][time]:.3f}"),
        "entropy_text": f"{entropy[TEXT]['all']:.3f}",
    }
    return fill((KEPT.parent / "ablation_text.md").read_text(), parts)


def maps(found: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], columns: Sequence[str], path: Path) -> Any:
    """Shares from 0 to 1 as one panel per table, with the same named rows and columns."""
    from matplotlib.figure import Figure

    figure = Figure((2 + 2.6 * len(found), 1.2 + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for i, ((name, table), axes) in enumerate(zip(found.items(), panels, strict=True)):
        shown = axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=1)
        axes.set_title(name)
        axes.set_xlabel("steps")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows if i == 0 else [""] * len(rows))
    figure.colorbar(shown, ax=panels[-1])
    return save_figure(figure, path)


def report() -> None:
    """The page, its figures, and the packed rows."""
    rows, entropy = Rows(unpacked(FOLDER)), json.loads(ENTROPY.read_text())
    found, times = rows.read(), [time.replace(" to ", "-") for time in TIMES]
    pack(rows, "ablation")
    (DOCS / "ablation.md").write_text(document(found, entropy))
    sums, gates, styled = (by_arm(found, what) for what in SPLITS)
    seen = {name: shares(sums, off, f"{name} seen") for name in ("subject", "style")}
    maps(seen, list(STAGES), times, DOCS / "ablation.png")
    learned = {
        "two subjects, gates at 1": shares(gates, held, "success"),
        "subject in a style, gates at 1": shares(styled, held, "success"),
    }
    learned["entropy of the gates"] = [[entropy[stage][time] for time in TIMES] for stage in STAGES]
    maps(learned, list(STAGES), times, DOCS / "ablation_gates.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=[*SPLITS, "report"], help=f"of {[*SPLITS, 'report']}; default: all")
    what = parser.parse_args().what
    if unknown := set(what) - {*SPLITS, "report"}:
        parser.error(f"unknown {sorted(unknown)}; known: {[*SPLITS, 'report']}")
    maps = [name for name in SPLITS if name in what]
    if maps:
        world = emoji_world(device=str(device()))
        in_bf16(world.pipe.unet)
        draw(world, maps)
    if "report" in what:
        report()


if __name__ == "__main__":
    main()
