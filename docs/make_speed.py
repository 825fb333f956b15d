"""docs/speed.md and docs/speed.png from what `python -m benchmarks --json` measured: the files in docs/speed/.

python docs/make_speed.py                        the page
python docs/make_speed.py --measure              measure everything again first, on a machine that does nothing else
python docs/make_speed.py --measure step-sd15    only these files
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import quantiles
from typing import Any

from matplotlib.figure import Figure

from benchmarks.__main__ import main as measure
from benchmarks.settings import Cost
from benchmarks.steps import Point

HERE = Path(__file__).parent
NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL", "tiny": "tiny", "thin": "SD 1.5's modules, narrow"}
HEAD = """# Speed and memory

SHORT

**No GPU was measured.** In each round every arm runs once and is divided by the base of that round; tables show
medians with quartiles. UNets have random weights, a batch of 2 (guidance), and N LoRAs on all attention layers, of rank
16 unless a section says otherwise. They ran on one CPU thread, by the process's own time, on a machine that did other
work, too. The times are older than the operations, which have become fewer since.

`set_adapters` is diffusers' own stack of the LoRAs. `sum`, `mole`, `flow` and `factors` are families of gates, `gated`
the family named. `collapsed` has the gates' average folded into the weights. `again` is the base once more: the noise.
`python docs/make_speed.py` makes the page from `docs/speed/`, with `--measure` all anew.
"""
DISPATCH = """
## Dispatch

What a step costs if it does next to no arithmetic: the modules of Stable Diffusion 1.5, but 8 to 24 channels wide,
with 16 tokens of text and LoRAs of rank 4 (`python -m benchmarks --what dispatch --threads 1 --clock cpu`). Times the
base:

| arm | N = 3 | 8 | 16 | goal |
|---|---|---|---|---|
"""
ABOUT_DISPATCH = """
![Cost of a step against the number of LoRAs, where a step is nearly all dispatch](speed.png)

The operations of PyTorch in a step (`--what operations --experts 3 8`), counted later than the times above, when `sum`
added 644, `mole` 980 and `flow` 932:

| arm | N | operations | more than the base | goal |
|---|---|---|---|---|
OPERATIONS
Of a text that comes again in the next step, 32 layers keep W x and A x, and as long as the factor is the same their
output, which is all of a step with `sum`. In a step of the narrow UNet these layers then take 0.0255 of the base's time
less with `sum` (standard error 0.0006) and 0.007 less with `mole`. For one picture with guidance in half precision that
takes 7.7 MB in SD 1.5 and 51.3 MB in SDXL. What is left is 5 operations in each of 96 layers: A x, its factor, the
product that adds to W x, and two views.
"""
FACTORS = """
`factors`, which `mole train` trains by default, beside `sum` and `mole` in one run (ROUNDS rounds) on another machine
that also trained a model:

| gates | N = 3 | 8 | 16 |
|---|---|---|---|
"""
STEPS = """
## Steps at real size

`python -m benchmarks --threads 1 --clock cpu --dtype bf16 --pixels 256 --size sd15` (or `sdxl`), times the base. Goals
are for `gated`:

| UNet, gates | base, rounds | N | again | set_adapters | gated | collapsed | goal |
|---|---|---|---|---|---|---|---|
"""
BINDING = """
## Binding

Each LoRA has its own word and part of the picture (`--arms sum mole "bound sum" "bound mole"`): dispatch as above (150
rounds in each of two runs, on another machine), and a step of Stable Diffusion 1.5 at 256 pixels in bf16 (two threads,
wall clock). The table has the difference from the same gates without binding, as a share of the base. For dispatch its
standard error is about .017, so a value near the goal may or may not meet it. When this was measured binding took 24
operations more with `sum` and 7 with `mole`; now it takes MORE_SUM and MORE_MOLE.

| | gates | N = 3 | 8 | 16 | goal |
|---|---|---|---|---|---|
"""
ONCE = """
## Once, and memory

The same command with `--what attach`, `update`, `collapse` or `memory`.

| | measured | goal |
|---|---|---|
"""
ONE_THREAD = ["--threads", "1", "--clock", "cpu"]
THIN = ["--size", "thin", "--rank", "4", "--experts", "3", "8", "16", *ONE_THREAD, "--arms"]
SD15 = ["--size", "sd15", "--dtype", "bf16", "--pixels", "256", *ONE_THREAD]
BOUND = ["sum", "mole", "bound sum", "bound mole"]
PICTURES = """
## Time to a picture

Seconds of each stage of 8 steps, and of all, beside the same with diffusers' `load_lora_weights` and `set_adapters`
(`--what picture`); and a new process of `mole draw` beside one of a script with diffusers alone (`--what cold`).

| stage | N | s | x diffusers |
|---|---|---|---|
"""
SCALING = """
## More LoRAs, higher ranks, more pictures

A step of the narrow UNet, against one number at a time (`--what scaling`); the others are 3 LoRAs of rank 4 and one picture.

| what grows | to | arm | x base |
|---|---|---|---|
"""
RUNS = {  # name of a file -> what measures it
    "operations": ["--what", "operations", "--experts", "3", "8"],
    "dispatch": ["--what", "dispatch", "--experts", "3", "8", "16", "--repeats", "40", *ONE_THREAD],
    "factors-dispatch": [*THIN, "base", "again", "sum", "mole", "gated", "--gates", "factors", "--repeats", "40"],
    "bound-dispatch": [*THIN, *BOUND, "--repeats", "60"],
    "bound-step": [*SD15, "--arms", *BOUND, "--experts", "3", "8", "--repeats", "3", "--threads", "2", "--clock", "wall"],
    "step-sd15": [*SD15, "--arms", "again", "set_adapters", "gated", "collapsed", "--experts", "3", "8", "--repeats", "5"],
    "step-sd15-flow": [*SD15, "--arms", "gated", "--gates", "flow", "--experts", "3", "8", "--repeats", "5"],
    "step-sdxl": [*SD15, "--size", "sdxl", "--arms", "set_adapters", "gated", "--experts", "3", "--repeats", "3"],
    "attach": [*SD15, "--what", "attach", "--experts", "8", "--repeats", "3"],
    "update": [*SD15, "--what", "update", "--experts", "3", "--repeats", "3"],
    "collapse": [*SD15, "--what", "collapse", "--experts", "3", "--repeats", "3"],
    "memory": [*SD15, "--what", "memory", "--arms", "set_adapters", "gated", "--experts", "8"],
    "scaling": ["--what", "scaling", "--size", "thin", "--rank", "4", "--experts", "3", "--repeats", "12", *ONE_THREAD],
    "picture": [*SD15, "--what", "picture", "--experts", "3", "--repeats", "2"],
    "cold": ["--what", "cold", "--experts", "3", "--repeats", "3", "--clock", "cpu"],
}
GOALS = {"sum": 1.15, "mole": 1.20, "flow": 1.25}
MORE_GOALS = {"sum": 600, "mole": 740, "flow": 720}
BOUND_GOAL = 60  # operations more than without binding
STEP_GOALS = {3: 1.03, 8: 1.05}
STEP_ARMS = ("again", "set_adapters", "gated", "collapsed")


def load(pattern: str) -> list[dict[str, Any]]:
    """The results of the files of that name, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((HERE / "speed").glob(pattern))]


def costs(result: dict[str, Any]) -> list[Cost]:
    """The costs of one result."""
    return [Cost(**row) for row in result["rows"]]


def shown(cost: Cost) -> str:
    """A ratio with its quartiles."""
    return f"{cost.ratio:.3f} [{cost.low:.3f}, {cost.high:.3f}]"


def met(value: float, goal: float) -> str:
    """The verdict on one goal."""
    return f"<= {goal}: {'met' if value <= goal else '**not met**'}"


def dispatch() -> str:
    """A step of the narrow UNet."""
    text = ""
    for arm, found in _by_number(load("dispatch.json")[0]).items():
        goal = met(max(cost.ratio for cost in found), GOALS[arm]) if arm in GOALS else ""
        text += f"| {arm} | {' | '.join(map(shown, found))} | {goal} |\n"
    return text


def _by_number(result: dict[str, Any]) -> dict[str, list[Cost]]:
    """Each arm with its costs by number of LoRAs, but not the base."""
    found: dict[str, list[Cost]] = {}
    for cost in sorted((c for c in costs(result) if c.experts and c.arm != "again"), key=lambda c: c.experts):
        found.setdefault(cost.arm, []).append(cost)
    return found


def operations() -> str:
    """The operations of a step."""
    text = ""
    for arm, rows in _by_count():
        row, gates, goal = rows[0], arm.removeprefix("bound "), ""
        if arm in MORE_GOALS:
            goal = met(row["more"], MORE_GOALS[arm])
        elif arm != gates:
            more = _more_if_bound(gates, row["experts"])
            goal = f"{more} over `{gates}` {met(more, BOUND_GOAL)}"
        numbers = ", ".join(str(each["experts"]) for each in rows if each["experts"])
        text += f"| {arm} | {numbers} | {row['operations']:,} | {row['more'] or ''} | {goal} |\n"
    return text


def _by_count() -> list[tuple[str, list[dict[str, Any]]]]:
    """Each arm with its rows, those of several numbers of LoRAs together if they have as many operations."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in load("operations.json")[0]["rows"]:
        found.setdefault((row["arm"], row["operations"]), []).append(row)
    return [(arm, rows) for (arm, _), rows in found.items()]


def _more_if_bound(gates: str, n: int) -> int:
    counts = {(row["arm"], row["experts"]): row["operations"] for row in load("operations.json")[0]["rows"]}
    return counts[f"bound {gates}", n] - counts[gates, n]


def factors() -> str:
    """Dispatch of gates at every layer."""
    (result,) = load("factors-dispatch.json")
    found = _by_number(result).items()
    rows = [f"| {arm.replace('gated', 'factors')} | {' | '.join(map(shown, row))} |\n" for arm, row in found]
    return FACTORS.replace("ROUNDS", str(result["repeats"])) + "".join(rows)


def steps() -> str:
    """Steps at real size."""
    text, shares = STEPS, ""
    for result in load("step-*.json"):
        about = f"{NAMES[result['size']]}, `{result['gates']}`"
        found = {(cost.arm, cost.experts): cost for cost in costs(result)}
        base = found["base", 0]
        for n in sorted({n for _, n in found if n}):
            cells = [shown(found[arm, n]) if (arm, n) in found else "-" for arm in STEP_ARMS]
            row = [
                about,
                f"{base.ms:.0f} ms, {len(base.seconds)}",
                str(n),
                *cells,
                met(found["gated", n].ratio, STEP_GOALS[n]),
            ]
            text += f"| {' | '.join(row)} |\n"
        if ("set_adapters", 8) in found:
            share = (found["gated", 8].ratio - 1) / (found["set_adapters", 8].ratio - 1)
            shares += f"\n{about}: overhead over that of `set_adapters` at 8 LoRAs: {share:.2f} ({met(share, 0.35)}).\n"
    return text + shares


def binding() -> str:
    """What binding costs beside the same gates, as a share of the base."""
    text = BINDING
    for gates in ("sum", "mole"):
        text = text.replace(f"MORE_{gates.upper()}", str(_more_if_bound(gates, 3)))
    for file, about, goal in (("bound-dispatch.json", "dispatch", 0.06), ("bound-step.json", "a step", 0.02)):
        found = _by_arm(file)
        for gates in ("sum", "mole"):
            more = {n: _more(found, gates, n) for n in (3, 8, 16) if (gates, n) in found}
            cells = [f"{m[1]:+.3f} [{m[0]:+.3f}, {m[2]:+.3f}]" for m in more.values()] + ["-"] * (3 - len(more))
            text += f"| {' | '.join([about, gates, *cells, met(max(m[1] for m in more.values()), goal)])} |\n"
    return text


def _by_arm(file: str) -> dict[tuple[str, int], Cost]:
    return {(cost.arm, cost.experts): cost for cost in costs(load(file)[0])}


def _more(found: dict[tuple[str, int], Cost], gates: str, n: int) -> list[float]:
    """What binding adds, as a share of the base: the quartiles over rounds."""
    rounds = zip(found[gates, n].seconds, found[f"bound {gates}", n].seconds, found["base", 0].seconds, strict=True)
    return quantiles([(bound - plain) / base for plain, bound, base in rounds], n=4, method="inclusive")


def once() -> str:
    """What is done once, and memory."""
    text = ONCE
    rows = (
        ("attach.json", ("attach", 8), "attach / diffusers' loading, N=8", 1.0),
        ("update.json", ("update", 3), "an update of the gates / forward and backward of the frozen base, N=3", 1.15),
        ("collapse.json", ("collapse static", 3), "folding static gates / 30 steps of the base, N=3", 0.02),
        ("collapse.json", ("collapse prompt", 3), "folding gates of a prompt / 30 steps of the base, N=3", 0.02),
    )
    for file, key, about, goal in rows:
        (result,) = load(file)
        cost = next(c for c in costs(result) if (c.arm, c.experts) == key)
        text += f"| {about} | {shown(cost)} | {met(cost.ratio, goal)} |\n"
    for row in load("memory.json")[0]["rows"]:
        said = f"{row['over'] / 1e6:.1f} MB / {row['own'] / 1e6:.1f} MB = {row['ratio']:.2f}"
        about = f"peak memory over the base / the experts' own, N={row['experts']}, {row['arm']}"
        text += f"| {about} | {said} | {met(row['ratio'], 1.05)} |\n"
    return text


def pictures() -> str:
    """Time to a picture, if it was measured."""
    rows = [cost for name in ("picture.json", "cold.json") for result in load(name) for cost in costs(result)]
    lines = [f"| {cost.arm} | {cost.experts} | {cost.ms / 1000:.2f} | {shown(cost)} |\n" for cost in rows]
    return PICTURES + "".join(lines) if rows else ""


def curves() -> str:
    """A step against LoRAs, ranks and pictures at once, if it was measured."""
    points = [Point(**row) for result in load("scaling.json") for row in result["rows"]]
    lines = [f"| {p.curve} | {p.at} | {p.arm} | {shown(p)} |\n" for p in points if p.experts]
    return SCALING + "".join(lines) if points else ""


def reuse() -> str:
    """What `mixture.every(k)` changes in a picture."""
    (result,) = load("reuse.json")
    text = """
## Gates evaluated less often

`mixture.every(k)` evaluates the gates in one of k steps. Mean absolute difference of pictures of the embedded world,
values in 0..1, trained gates per token, 20 steps, no tiles (`benchmarks/reuse.py`):

| | difference |
|---|---|
"""
    return text + "".join(f"| {name} | {value:.4f} |\n" for name, value in result["means"].items())


def short() -> str:
    """What a step costs at real size, in a sentence."""
    found = _by_arm("step-sd15.json")
    gated, plain = ([shown(found[arm, n]) for n in (3, 8)] for arm in ("gated", "set_adapters"))
    return (
        f"A step of Stable Diffusion 1.5 with `mole` gates takes {gated[0]} of the base's time with 3 LoRAs\nand "
        f"{gated[1]} with 8. With diffusers' `set_adapters` it takes {plain[0]} and\n{plain[1]} "
        "([at real size](#steps-at-real-size): random weights, bf16, 256 pixels, one CPU thread)."
    )


def document() -> str:
    """The whole page."""
    head = HEAD.replace("SHORT", short())
    return (
        head
        + steps()
        + DISPATCH
        + dispatch()
        + ABOUT_DISPATCH.replace("OPERATIONS\n", operations() + "\n")
        + factors()
        + binding()
        + curves()
        + once()
        + pictures()
        + reuse()
    )


def curve(costs: list[Cost], path: Path) -> None:
    """Draw each arm's cost against the number of experts, with its quartiles."""
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="#000000", linewidth=0.8)
    for arm in dict.fromkeys(cost.arm for cost in costs if cost.experts):
        line = sorted((c for c in costs if c.arm == arm), key=lambda c: c.experts)
        x, spread = [c.experts for c in line], [[c.ratio - c.low for c in line], [c.high - c.ratio for c in line]]
        axes.errorbar(x, [c.ratio for c in line], spread, marker="o", markersize=4, capsize=2, label=arm)
    ticks = sorted({c.experts for c in costs if c.experts})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_xlabel("LoRAs")
    axes.set_ylabel("one step / one step of the base")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def measured_again(names: Sequence[str]) -> None:
    """Measure the files of these names, or all if there are none."""
    for name in names or RUNS:
        print(name, flush=True)
        with redirect_stdout(result := io.StringIO()):
            if measure([*RUNS[name], "--json"]):
                raise SystemExit(f"{name} could not be measured")
        (HERE / "speed" / f"{name}.json").write_text(result.getvalue())


def main() -> None:
    """Write the page and its figure."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--measure", nargs="*", choices=list(RUNS), metavar="FILE", help=", ".join(RUNS))
    if (again := command.parse_args().measure) is not None:
        measured_again(again)
    (HERE / "speed.md").write_text(document())
    curve([cost for cost in costs(load("dispatch.json")[0]) if cost.arm in ("set_adapters", *GOALS)], HERE / "speed.png")


if __name__ == "__main__":
    main()
