"""docs/speed.md and docs/speed.png from what `python -m benchmarks --json` measured: the files in docs/speed/.

python docs/make_speed.py                        the page
python docs/make_speed.py --measure              measure everything again first, on a machine that does nothing else
python docs/make_speed.py --measure step-sd15    only these files
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles
from typing import Any

from matplotlib.figure import Figure

from benchmarks.__main__ import main as measure
from benchmarks.settings import Cost
from benchmarks.steps import CURVES, Point

HERE = Path(__file__).parent
HEAD = """# Speed and memory

SHORT

**Neither a GPU nor a transformer, such as Flux, was timed**, and tiles only [in the embedded
world](results.md#how-the-default-was-chosen). In each round every arm runs once and is divided by the base of that
round; the page shows medians with quartiles. UNets have random weights, a batch of 2 (guidance), and N LoRAs on all
attention layers, of rank 16 unless a section says otherwise. They ran on one CPU thread, by the process's own time
(`python docs/make_speed.py --measure`); another core did other work during steps of SD 1.5 and compiled ones.

`set_adapters` is diffusers' own stack of the LoRAs. `sum`, `mole`, `flow` and `factors` are gate types; `bound`
gives each LoRA a word and a part of the picture. `collapsed` has the gates' average folded into the weights. `again` is
the base once more: the noise.
"""
GOALS = """
## Goals

| what, times the base unless it says otherwise | N | measured | goal | |
|---|---|---|---|---|
"""
FLOOR = """
**The floor.** `products` computes W x + B (A x) with the LoRAs' matrices side by side, and nothing else: no gates, no
strengths, no places. By PyTorch's count of multiplications, that takes 0.018, 0.049 and 0.099 of a step of SD 1.5 with
3, 8 and 16 LoRAs; the goals for 8 and 16 ask for less. With blocks compiled one by one, it takes PRODUCTS times the
base (the base once more: AGAIN), which leaves nothing of the goal for gates. What `mole` takes beyond, as `sum`
does (SUM), is mostly outside of the compiled code. Tests count that 20 changes compile nothing
again, and that an update of gates reads no value from the device beyond the base's, once it has seen each prompt.

Keys and values of the text are kept for the whole picture: 7.7 MB in SD 1.5 and 51.3 MB in SDXL in half precision. Without
them the peak would be 1.02; with them a step of SDXL is below the base's.

Layers hold the ranks of LoRAs that act. All files, 6.4 MB each, are in the CPU's memory, too, uncounted. Two
others than in the picture before take MOVED of a step of SD 1.5 once.
All ranks are held in a model that was compiled, is offloaded layer by layer or was drawn with by [another
pipeline](hosts.md), while gates are trained, and for `rank`, `factors` and `retrieval` gates and `mole` gates that read
the LoRAs' outputs.
"""
STEPS = """
## Steps at real size

At 256 pixels in bf16, times a step of the base:

| UNet, base | arm | N = 3 | 8 | 16 |
|---|---|---|---|---|
"""
DISPATCH = """
## Dispatch

A step with next to no arithmetic, as where a card waits for its host: the modules of SD 1.5, but 8 to 24 channels wide,
at 64 pixels, with 16 tokens of text and LoRAs of rank 4. Operations are those that PyTorch is asked for (the base's are
BASE). Times the base, ROUNDS:

| arm | operations more than the base | N = 3 | 8 | 16 |
|---|---|---|---|---|
"""
SCALING = """
![Cost of such a step with LoRAs, ranks, pictures at once and steps, as a share of the base's](speed.png)

Curves have eight rounds, with 3 LoRAs where they are not counted.
"""
WHOLE = "The last is of whole pictures.\n"
PICTURES = """
## Time to a picture

CPU seconds with 3 LoRAs and `mole` gates: 8 steps of SD 1.5 at 256 pixels in bf16, two rounds, and a new
process of `mole draw` on a tiny model beside one of a script with diffusers alone (`cold`).

| stage | diffusers | mixture | ratio |
|---|---|---|---|
"""
REUSE = """
## Gates evaluated less often

`mixture.every(k)` evaluates the gates in one of k steps. Mean absolute difference of pictures of the embedded world,
values in 0..1, `flow` gates, 20 steps, no tiles (`benchmarks/reuse.py`):

| | difference |
|---|---|
"""
ONE_THREAD = ["--threads", "1", "--clock", "cpu"]
THIN = ["--size", "thin", "--rank", "4", *ONE_THREAD]
SD15 = ["--size", "sd15", "--dtype", "bf16", "--pixels", "256", *ONE_THREAD]
STEP_ARMS = ["again", "set_adapters", "products", "gated", "collapsed"]
COMPILED = ["again", "products", "sum", "gated"]
OF_FOLDER = ["--gates", "sum", "--arms", "gated", "two named", "--experts", "2", "100"]
BOUND = ["sum", "mole", "bound sum", "bound mole"]
RUNS = {  # name of a file -> what measures it
    "operations": ["--what", "operations", "--experts", "3", "8"],
    "dispatch": ["--what", "dispatch", "--experts", "3", "8", "16", "--repeats", "40", *ONE_THREAD],
    "compiled": [*THIN, "--arms", *COMPILED, "--experts", "8", "--compile", "blocks", "--repeats", "120"],
    "step-sd15": [*SD15, "--arms", *STEP_ARMS, "--experts", "3", "8", "16", "--repeats", "48"],
    "step-sd15-flow": [*SD15, "--arms", "gated", "--gates", "flow", "--experts", "3", "8", "--repeats", "8"],
    "bound-step": [*SD15, "--arms", *BOUND, "--experts", "3", "8", "--repeats", "8"],
    "step-sdxl": [*SD15, "--size", "sdxl", "--arms", "again", "set_adapters", "gated", "--experts", "3", "--repeats", "8"],
    "attach": [*SD15, "--what", "attach", "--experts", "8", "--repeats", "3"],
    "moving": [*SD15, "--what", "moving", "--experts", "4", "--repeats", "3"],
    "update": [*SD15, "--what", "update", "--experts", "3", "--repeats", "3"],
    "collapse": [*SD15, "--what", "collapse", "--experts", "3", "--repeats", "3"],
    "memory": [*SD15, "--what", "memory", "--arms", "set_adapters", "gated", "--experts", "8"],
    "folder": [*THIN, *OF_FOLDER, "--repeats", "40"],
    "folder-memory": [*THIN, *OF_FOLDER, "--what", "memory"],
    "scaling": [*THIN, "--what", "scaling", "--experts", "3", "--repeats", "8"],
    "picture": [*SD15, "--what", "picture", "--experts", "3", "--repeats", "2"],
    "cold": ["--what", "cold", "--experts", "3", "--repeats", "3", "--clock", "cpu"],
}
MORE_GOALS = {"sum": 600, "mole": 740, "flow": 720}
PAIR = ("sum", "mole")
Found = tuple[str, float, bool | None]  # what was measured, the goal, and whether it is met; None if it was not measured


def load(name: str) -> Any:
    """The result of a file."""
    return json.loads((HERE / "speed" / f"{name}.json").read_text())


def costs(name: str) -> dict[tuple[str, int], Cost]:
    """The costs in a file, by arm and number of LoRAs; none if it was not measured. Gated arms are named by their gates."""
    if not (HERE / "speed" / f"{name}.json").exists():
        return {}
    result = load(name)
    named = {"gated": result["gates"]}
    return {(named.get(row["arm"], row["arm"]), row["experts"]): Cost(**row) for row in result["rows"]}


def shown(cost: Cost) -> str:
    """A ratio with its quartiles."""
    return quartiles((cost.low, cost.ratio, cost.high))


def quartiles(values: Sequence[float], form: str = ".3f") -> str:
    """The middle one with the others."""
    low, middle, high = (f"{value:{form}}" for value in values)
    return f"{middle} [{low}, {high}]"


def goal(what: str, n: str, *found: Found) -> str:
    """A row of the table of goals, for one number or for several of a kind."""
    limits = ", ".join(dict.fromkeys(f"{limit:g}" for _, limit, _ in found))
    met = {met for *_, met in found}
    said = "" if None in met else "met" if met == {True} else "**not met**" if met == {False} else "**in part**"
    return f"| {what} | {n} | {'; '.join(measured for measured, *_ in found)} | <= {limits} | {said} |\n"


def below(name: str, arm: str, n: int, limit: float) -> Found:
    """A ratio to the base in a file."""
    cost = costs(name).get((arm, n))
    return ("not measured", limit, None) if cost is None else (shown(cost), limit, cost.ratio <= limit)


def goals() -> str:
    """All goals, with what was measured."""
    return GOALS + _counted() + _in_a_step() + _once()


def _counted() -> str:
    """Goals for numbers that are the same in every run."""
    counts = {(row["arm"], row["experts"]): row for row in load("operations")["rows"]}
    more = [(counts[arm, 3]["more"], limit) for arm, limit in MORE_GOALS.items()]
    text = goal(
        f"operations of a step more than the base: {names(MORE_GOALS)}", "3, 8", *((f"{n}", m, n <= m) for n, m in more)
    )
    bound = [counts[f"bound {gates}", 3]["more"] - counts[gates, 3]["more"] for gates in PAIR]
    text += goal(f"operations of a step more if bound: {names(PAIR)}", "3, 8", *((f"{n}", 60, n <= 60) for n in bound))
    reads = max(row["reads"] for row in counts.values())
    return text + goal("values that a step reads from the device", "3, 8", (f"{reads}", 0, reads == 0))


def _in_a_step() -> str:
    """Goals for times of a step."""
    text = ""
    for gates in PAIR:
        more = [_more(costs("bound-step"), gates, n) for n in (3, 8)]
        found = [(quartiles(each, "+.3f"), 0.02, each[1] <= 0.02) for each in more]
        text += goal(f"a step of SD 1.5, bound less not bound: `{gates}`", "3, 8", *found)
    text += goal("dispatch, both compiled by blocks: `mole`", "8", below("compiled", "mole", 8, 1.10))
    limits = {3: 1.02, 8: 1.03, 16: 1.06}
    text += goal("a step of SD 1.5: `mole`", "3, 8, 16", *(below("step-sd15", "mole", n, limits[n]) for n in limits))
    text += goal("a step of SDXL: `mole`", "3", below("step-sdxl", "mole", 3, 1.04))
    sd15 = costs("step-sd15")
    share = (sd15["mole", 8].ratio - 1) / (sd15["set_adapters", 8].ratio - 1)
    about = "what `mole` adds / what `set_adapters` adds, SD 1.5"
    return text + goal(about, "8", (f"{share:.2f}", 0.35, share <= 0.35))


def _once() -> str:
    """Goals for what is done once, and for memory."""
    text = goal("attaching / diffusers' loading, SD 1.5", "8", below("attach", "attach", 8, 1.0))
    about = "an update of gates / forward and backward of the frozen base"
    text += goal(about, "3", below("update", "update", 3, 1.15))
    folded = (below("collapse", f"collapse {gates}", 3, 0.02) for gates in ("static", "prompt"))
    text += goal("folding / 30 steps of the base: `static`, `prompt`", "3", *folded)
    for row in load("memory")["rows"]:
        share = row["over"] / row["own"]
        measured = f"{row['over'] / 1e6:.1f} / {row['own'] / 1e6:.1f} MB = {share:.2f}"
        about = f"peak memory over the base / the LoRAs' own: `{'mole' if row['arm'] == 'gated' else row['arm']}`"
        text += goal(about, str(row["experts"]), (measured, 1.05, share <= 1.05))
    text += goal("100 LoRAs of a folder attached, 2 named / 2 attached: dispatch", "100", _of_folder())
    held = {(row["arm"], row["experts"]): row["over"] for row in load("folder-memory")["rows"]}
    share = held["two named", 100] / held["gated", 2]
    text += goal("the same: peak memory over the base", "100", (f"{share:.2f}", 1.05, share <= 1.05))
    return text + goal("cold `mole draw` / a script of diffusers", "3", below("cold", "cold, mole draw", 3, 1.2))


def _of_folder() -> Found:
    """A step with many LoRAs of which two act, over one with only these two."""
    many, two = (costs("folder")[each].seconds for each in (("two named", 100), ("sum", 2)))
    ratios = quantiles([one / other for one, other in zip(many, two, strict=True)], n=4, method="inclusive")
    return quartiles(ratios), 1.02, ratios[1] <= 1.02


def floor() -> str:
    """What the products of A and B alone take, and what is paid beside them."""
    found = costs("compiled")
    floor = FLOOR.replace("PRODUCTS", shown(found["products", 8]))
    moved = shown(costs("moving")["others", 4])
    return floor.replace("AGAIN", shown(found["again", 8])).replace("SUM", shown(found["sum", 8])).replace("MOVED", moved)


def names(families: Iterable[str]) -> str:
    """Names of gate types, in a row of the table."""
    return ", ".join(f"`{name}`" for name in families)


def _more(found: dict[tuple[str, int], Cost], gates: str, n: int) -> list[float]:
    """What binding adds, as a share of the base: the quartiles over rounds."""
    rounds = zip(found[gates, n].seconds, found[f"bound {gates}", n].seconds, found["base", 0].seconds, strict=True)
    return quantiles([(bound - plain) / base for plain, bound, base in rounds], n=4, method="inclusive")


def table(found: dict[tuple[str, int], Cost], first: Iterable[Sequence[str]]) -> str:
    """A row for each arm, with the cells that it begins with: its costs by the number of LoRAs. The arm is the last cell."""
    rows = ((cells, [found.get((cells[-1], n)) for n in (3, 8, 16)]) for cells in first)
    return "".join(f"| {' | '.join([*cells, *(shown(c) if c else '-' for c in row)])} |\n" for cells, row in rows)


def steps() -> str:
    """Steps at real size."""
    text = STEPS
    for name, about in (("step-sd15", "SD 1.5"), ("step-sd15-flow", "SD 1.5"), ("step-sdxl", "SDXL")):
        found = costs(name)
        base = found.pop(("base", 0))
        about += f", {base.ms:.0f} ms, {len(base.seconds)} rounds"
        arms = dict.fromkeys(arm for arm, n in found)
        text += table(found, [("" if k else about, arm) for k, arm in enumerate(arms)])
    return text


def dispatch() -> str:
    """A step of the narrow UNet."""
    counts = {row["arm"]: row for row in load("operations")["rows"] if row["experts"] in (0, 3)}
    found = costs("dispatch")
    rounds = f"{load('dispatch')['repeats']} rounds"
    text = DISPATCH.replace("BASE", f"{counts['base']['operations']:,}").replace("ROUNDS", rounds)
    for line in table(found, [(arm,) for arm in dict.fromkeys(arm for arm, n in found if n)]).splitlines(keepends=True):
        arm = line.split(" | ")[0].strip("| ")
        text += line.replace(f"| {arm} |", f"| {arm} | {counts[arm]['more'] if arm in counts else '-'} |")
    return text


def scaling() -> str:
    """The figure of curves."""
    return SCALING + WHOLE * any(row.get("curve") == "steps" for row in load("scaling")["rows"])


def pictures() -> str:
    """Time to a picture, by stage."""
    text = PICTURES
    for name in ("picture", "cold"):
        found = costs(name)
        for stage in dict.fromkeys(arm.rpartition(", ")[0] for arm, _ in found):
            theirs, ours = (cost for (arm, _), cost in found.items() if arm.rpartition(", ")[0] == stage)
            text += f"| {stage} | {theirs.ms / 1000:.2f} | {ours.ms / 1000:.2f} | {shown(ours)} |\n"
    return text if text != PICTURES else ""


def reuse() -> str:
    """What `mixture.every(k)` changes in a picture."""
    return REUSE + "".join(f"| {name} | {value:.4f} |\n" for name, value in load("reuse")["means"].items())


def short() -> str:
    """What a step costs at real size, in a sentence."""
    found = costs("step-sd15")
    gated, plain = ([f"{found[arm, n].ratio:.2f}" for n in (3, 8)] for arm in ("mole", "set_adapters"))
    return (
        f"A step of Stable Diffusion 1.5 with `mole` gates takes {gated[0]} times as long as the base's with 3 LoRAs and "
        f"{gated[1]} with 8;\nwith diffusers' `set_adapters` "
        f"{plain[0]} and {plain[1]} ([at real size](#steps-at-real-size); without binding or tiles)."
    )


def document() -> str:
    """The whole page."""
    return HEAD.replace("SHORT", short()) + goals() + floor() + steps() + dispatch() + scaling() + pictures() + reuse()


def curves(path: Path) -> None:
    """Draw each arm's cost along each curve, with its quartiles; or by the table of dispatch if no curve was measured."""
    points = [Point(**asdict(cost), curve="experts", at=n) for (_, n), cost in costs("dispatch").items()]
    if (HERE / "speed/scaling.json").exists():
        points = [Point(**row) for row in load("scaling")["rows"]]
    drawn = [curve for curve in CURVES if any(point.curve == curve for point in points)]
    figure = Figure((3 + 3 * len(drawn), 4), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        axes.axhline(1, color="#000000", linewidth=0.8)
        for arm in dict.fromkeys(point.arm for point in points if point.experts and point.arm != "again"):
            line = [point for point in points if (point.arm, point.curve) == (arm, curve)]
            spread = [[p.ratio - p.low for p in line], [p.high - p.ratio for p in line]]
            axes.errorbar(
                [p.at for p in line], [p.ratio for p in line], spread, marker="o", markersize=4, capsize=2, label=arm
            )
        axes.set_xscale("log", base=2)
        ticks = sorted({point.at for point in points if point.curve == curve and point.experts})
        axes.set_xticks(ticks, [str(at) for at in ticks])
        axes.set_xlabel(
            {"experts": "LoRAs", "rank": "rank", "pictures": "pictures at once", "steps": "steps of a picture"}[curve]
        )
    figure.axes[0].set_ylabel("one step / one step of the base")
    figure.axes[0].legend(fontsize=8)
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
    curves(HERE / "speed.png")


if __name__ == "__main__":
    main()
