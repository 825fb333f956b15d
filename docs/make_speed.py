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
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.__main__ import main as measure
from benchmarks.settings import Cost
from benchmarks.steps import Point

HERE = Path(__file__).parent
NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL", "tiny": "tiny", "thin": "SD 1.5's modules, narrow"}
HEAD = """# What a mixture costs

SHORT

This page is made by `python docs/make_speed.py` from the files in `docs/speed/`, which `python -m benchmarks --json`
wrote. Do not edit it. `python docs/make_speed.py --measure` measures all of it again, on a machine that does nothing else.
Only the operations have been counted since keys and values of the text are kept; the times in the tables are older.

All numbers are ratios within one run. In each round every arm runs once, the arms take turns, and the ratio to the base is
taken round by round. The tables show medians, with quartiles in brackets.

The UNets have random weights, a batch of 2 (guidance), and LoRAs on all attention layers, of rank 16 unless a section says
otherwise. They ran on one CPU thread of a machine that did other work, too. The time is the process's own (`--clock cpu`),
but caches and memory were shared. The arm `again` runs the base once more, so it shows how much is noise. No GPU was
available, but the same commands measure one.

| arm | what it is |
|---|---|
| `base` | no LoRA; `again` is the base once more |
| `set_adapters` | diffusers' own way to stack the N LoRAs, with weights 1 and no gates |
| `sum`, `mole`, `flow` | a mixture with gates of that family, one per block; `gated` is `mole` |
| `collapsed` | the gates' average folded into the weights by `mixture.collapsed(prompt)` |
"""
DISPATCH = """
## Dispatch

This section shows what a step costs if it does next to no arithmetic. On a GPU, this is the work of the host's thread
while the card computes. It is measured on a UNet with the same modules as Stable Diffusion 1.5, but only 8 to 24 channels
wide, with 16 tokens of text and LoRAs of rank 4 (`python -m benchmarks --what dispatch --threads 1 --clock cpu`).

"before" is an older version, whose layers took products of [B, T, C] instead of rows, and whose gates read the text at
every step. Both versions were measured on one machine, one after the other, beside a training.

| arm | N | before | now | goal |
|---|---|---|---|---|
"""
ABOUT_DISPATCH = """
![Cost of a step against the number of LoRAs, where a step is nearly all dispatch](speed.png)

Beside the host's own product, a layer makes one down product, one product with the factor and one `addmm`. These are 5
operations more than the host's 4 (in the column "before": 9). Keys and values of the text are kept while a call of the
pipeline runs: the layers that make them read the same text at every step. If their factors stay the same, too, a step does
nothing there; otherwise it does the product with the factor and the `addmm`. This holds for the texts of up to two pictures
with guidance. These are the operations of PyTorch in a step (`--what operations --gates factors --experts 3 8`; `gated` are
`factors`). They were counted later than the times above were measured. Back then nothing was kept, and `sum` added 644,
`mole` 980 and `flow` 932:

| arm | N | operations | more than the base | goal |
|---|---|---|---|---|
OPERATIONS
What is left, and why:

- `sum`: 96 layers read the picture and take 5 more each, the 32 that read the text take none, not even the host's 4, and 4
  are the noise level, once in a step. Two of the layers' five only turn a matrix around. Keeping the turned views would save
  192, but they would hold a matrix's memory on the card after the pipeline has left it. Where all weights are 1, the product
  with the factor (96) could be left out, but binding would then add it again in each layer.
- `mole`: the layers that read the text take the host's 4, as its gates read the picture. The gate takes seven in a block
  (mean, length, its lower limit, product, division, softmax, times N), and two give each row of picture and of text its
  factor, for 8 layers. The temperature is in the matrix, which is kept until it changes.
- `flow`: the gate takes three in a block (product, softmax, bias), and two give each row its factor. Its gates of the text
  read the text alone, so keys and values are kept as with `sum`.

The goals of time are not met; they were measured when there were more operations. Trials on `sum` at N=3
show what is left:

| what a layer does | x base |
|---|---|
| the host's product alone, with all hooks and processors in place | 1.04 to 1.06 |
| and the down product, with nothing done with it | 1.11 |
| and the product with the factor | 1.14 |
| and its addition: all of the arithmetic, but no hooks checked and no gate asked | 1.18 to 1.21 |
| the same with one down product for q, k and v, or for k and v, if they have one input | about 0.03 less |
| the same without the product with the factor, if all weigh 1 | about 0.03 less |

Neither of the last two was kept. Together they would still leave `sum` at about 1.16, and would need a second copy of the
down matrices, an input that has to be recognised, and a second route. A gate of MoLE's form is twelve small operations per
block, .15 of a step in all. Taking out five of them (as a trial, with other results) gained .04.
Since then they have become seven, with the same results, which was not timed. Keeping keys and values gained .036 of a step
for `sum`, .015 for `flow` and .040 for `factors`, and nothing for `mole` (-.014), at N=3 in 40 rounds of one run, inside a
call of the pipeline against outside of one. The machine did much other work: quartiles were up to .07 away. It should be
measured again.
"""
FACTORS = """
`factors` are the gates that `mole train` trains by default. They sit at every layer, and their factors are kept until
something changes, also under a schedule of strengths (as in the app and in `mole draw`) and for each tile. (When they were
asked at every step, they took 2.07 [1.99, 2.35] and 2.11 [2.07, 2.26] of the base at 3 and 8 LoRAs, 25 rounds.) Here they
are beside `sum` and `mole` in one run (`--size thin --rank 4 --arms base again sum mole gated --gates factors --experts
3 8 16 --repeats ROUNDS`, otherwise as above), on the machine of the table under [Binding](#binding), beside a training:

| gates | N | x base |
|---|---|---|
"""
STEPS = """
## Steps at real size

The command is `python -m benchmarks --threads 1 --clock cpu --dtype bf16 --pixels 256 --size sd15` (or `sdxl`), with
`--arms`, `--experts` and `--gates` as the tables say.
"""
BINDING = """
## Binding

Here each LoRA has its own word and its own part of the picture, and is compared with the same gates without binding
(`--arms sum mole "bound sum" "bound mole"`). Two things were measured:

- dispatch: `--size thin --rank 4`, 150 rounds in each of two runs, on another machine than above, whose other core was idle
- a step: Stable Diffusion 1.5 at 256 pixels in bf16, two threads, by the wall clock

"More" is the median over rounds of the difference between the two ratios. For dispatch its standard error is about .017,
so you cannot tell whether a value near the goal meets it.

"Before" is an older version, measured in 150 rounds after the first run. Each layer looked at its masks by token again,
and diffusers repeated the biases of cross-attention for every head at every step. That took 210 operations more with `sum`
and 162 with `mole`. When the table was measured it took 24 and 7. Now it takes MORE_SUM and MORE_MOLE, of
which none is in every layer, and `mole` without binding takes 357 fewer than then ([counted](#dispatch)).

| | gates | N | not bound | bound | more | before |
|---|---|---|---|---|---|---|
"""
ONCE = """
## Once, and memory

The command is the same, with `--what attach`, `update`, `collapse` or `memory`. Memory was measured before keys and values
of the text were kept. By arithmetic they take 7.7 MB more in SD 1.5, and 51.3 MB in SDXL, for one picture with guidance in
half precision (and A x of the text 0.5 and 2.1 MB for 3 LoRAs of rank 16), and at most twice that: texts of more than two
pictures are not kept.

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
    "operations": ["--what", "operations", "--gates", "factors", "--experts", "3", "8"],
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
    """Dispatch before and now."""
    (before,), (now,) = load("dispatch-before.json"), load("dispatch.json")
    old = {(cost.arm, cost.experts): cost for cost in costs(before)}
    lines = []
    for cost in costs(now):
        goal = met(cost.ratio, GOALS[cost.arm]) if cost.arm in GOALS else ""
        if cost.experts:
            earlier = shown(old[cost.arm, cost.experts])
            lines.append(f"| {cost.arm} | {cost.experts} | {earlier} | {shown(cost)} | {goal} |")
    return "\n".join(lines) + "\n"


def operations() -> str:
    """The operations of a step."""
    counts = {(row["arm"], row["experts"]): row for row in load("operations.json")[0]["rows"]}
    text = ""
    for (arm, n), row in counts.items():
        goal = ""
        if arm in MORE_GOALS:
            goal = met(row["more"], MORE_GOALS[arm])
        elif arm.startswith("bound "):
            goal = f"{_more_if_bound(arm.removeprefix('bound '), n)} over `{arm.removeprefix('bound ')}` "
            goal += met(_more_if_bound(arm.removeprefix("bound "), n), BOUND_GOAL)
        text += f"| {arm} | {n or ''} | {row['operations']:,} | {row['more'] or ''} | {goal} |\n"
    return text


def _more_if_bound(gates: str, n: int) -> int:
    counts = {(row["arm"], row["experts"]): row["operations"] for row in load("operations.json")[0]["rows"]}
    return counts[f"bound {gates}", n] - counts[gates, n]


def factors() -> str:
    """Dispatch of gates at every layer."""
    (result,) = load("factors-dispatch.json")
    found = [cost for cost in costs(result) if cost.experts]
    rows = [f"| {cost.arm.replace('gated', 'factors')} | {cost.experts} | {shown(cost)} |\n" for cost in found]
    return FACTORS.replace("ROUNDS", str(result["repeats"])) + "".join(rows)


def steps() -> str:
    """Steps at real size, one table for each setting."""
    text = STEPS
    for result in load("step-*.json"):
        size, gates = NAMES[result["size"]], result["gates"]
        text += f"\n### {size}, {result['dtype']}, {result['pixels']} pixels, `{gates}` gates\n\n"
        text += "| arm | N | ms | x base | rounds | goal |\n|---|---|---|---|---|---|\n"
        for cost in costs(result):
            goal = met(cost.ratio, STEP_GOALS[cost.experts]) if cost.arm == "gated" and cost.experts in STEP_GOALS else ""
            text += f"| {cost.arm} | {cost.experts or ''} | {cost.ms:.0f} | {shown(cost)} | {len(cost.seconds)} | {goal} |\n"
        for n in (3, 8):
            over = {cost.arm: cost.ratio - 1 for cost in costs(result) if cost.experts == n}
            if n == 8 and {"gated", "set_adapters"} <= set(over):
                share = over["gated"] / over["set_adapters"]
                text += f"\nOverhead over that of `set_adapters` at {n} LoRAs: {share:.2f} ({met(share, 0.35)}).\n"
    return text


def binding() -> str:
    """What binding costs beside the same gates, as a share of the base."""
    text, before = BINDING, _by_arm("bound-dispatch-before.json")
    for gates in ("sum", "mole"):
        text = text.replace(f"MORE_{gates.upper()}", str(_more_if_bound(gates, 3)))
    for file, about, goal in (("bound-dispatch.json", "dispatch", 0.06), ("bound-step.json", "a step", 0.02)):
        found = _by_arm(file)
        for gates, n in ((gates, n) for gates in ("sum", "mole") for arm, n in found if arm == gates):
            plain, bound, more = found[gates, n], found[f"bound {gates}", n], _more(found, gates, n)
            row = [about, gates, n, shown(plain), shown(bound), f"{more:+.3f} ({met(more, goal)})"]
            earlier = f"{_more(before, gates, n):+.3f}" if about == "dispatch" else ""
            text += f"| {' | '.join(map(str, row))} | {earlier} |\n"
    return text


def _by_arm(file: str) -> dict[tuple[str, int], Cost]:
    return {(cost.arm, cost.experts): cost for cost in costs(load(file)[0])}


def _more(found: dict[tuple[str, int], Cost], gates: str, n: int) -> float:
    """What binding adds, as a share of the base: the median over rounds."""
    rounds = zip(found[gates, n].seconds, found[f"bound {gates}", n].seconds, found["base", 0].seconds, strict=True)
    return median((bound - plain) / base for plain, bound, base in rounds)


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

`mixture.every(k)` evaluates the gates in only one of k steps and keeps their weights in the others. The table shows how
much this changes a picture of the embedded world: the mean absolute difference of values in 0..1, with trained gates per
token, 20 steps and no tiles (`benchmarks/reuse.py`). Steps in tiles evaluate the gates of every tile, whatever k is.

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
        + DISPATCH
        + dispatch()
        + ABOUT_DISPATCH.replace("OPERATIONS\n", operations() + "\n")
        + factors()
        + binding()
        + steps()
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
