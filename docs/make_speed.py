"""docs/speed.md and docs/speed.png from what `python -m benchmarks --json` measured: the files in docs/speed/.

python docs/make_speed.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.settings import Cost

HERE = Path(__file__).parent
NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL", "tiny": "tiny", "thin": "SD 1.5's modules, narrow"}
HEAD = """# What a mixture costs

Made by `python docs/make_speed.py` from the files in `docs/speed/`, which `python -m benchmarks --json` wrote; do not edit.

All numbers are ratios within one run: every arm runs once in a round, rounds take turns, and a ratio is taken round by
round; medians, with quartiles in brackets. UNets have random weights, a batch of 2 (guidance) and LoRAs on all attention
layers, of rank 16 unless said otherwise. One CPU thread of a machine that did other work, too: time is the process's own
(`--clock cpu`), but caches and memory were shared; the arm `again`, the base once more, says how much is noise. No GPU was
at hand; the same commands measure one.

| arm | what it is |
|---|---|
| `base` | no LoRA; `again` is the base once more |
| `set_adapters` | diffusers' own stacking of the N LoRAs, weights 1, no gates |
| `sum`, `mole`, `flow` | a mixture whose gates are of that family, one per block; `gated` is `mole` |
| `collapsed` | the gates' average folded into the weights by `mixture.collapsed(prompt)` |
"""
DISPATCH = """
## Dispatch

What a step costs where arithmetic is next to nothing: the UNet of Stable Diffusion 1.5 module for module, 8 to 24 channels
wide, 16 tokens of text, LoRAs of rank 4 (`python -m benchmarks --what dispatch --threads 1 --clock cpu`). On a GPU this is
what the host's thread does while the card computes. "before" is the layer whose products were of [B, T, C] instead of rows,
and gates that read the text at every step; both were measured on one machine, one after the other, beside a training.

| arm | N | before | now | goal |
|---|---|---|---|---|
"""
ABOUT_DISPATCH = """
![Cost of a step against the number of LoRAs, where a step is nearly all dispatch](speed.png)

A layer makes one down product, one product with the factor and one `addmm` beside the host's own: 5 operations more than
the host's 4 (before: 9). Of PyTorch's operations a step of the base has 1,616; sum adds 644 (before: 1,156), mole 980
(1,348), flow 825 (1,412, and 932 when the table was measured), and nothing of a layer's is cached
(`tests/benchmarks/test_bench.py::test_what_a_step_asks_of_pytorch` counts them at N=3). The goals are not met, and trials on
the sum at N=3 say what is left:

| what a layer does | x base |
|---|---|
| the host's product alone, with all hooks and processors in place | 1.04 to 1.06 |
| and the down product, nothing done with it | 1.11 |
| and the product with the factor | 1.14 |
| and its addition: all of the arithmetic, no check of hooks, no gate asked | 1.18 to 1.21 |
| the same with one down product for q, k and v, or k and v, that have one input | about 0.03 less |
| the same without the product with the factor, where all weigh 1 | about 0.03 less |

Neither of the last two was kept: both together would leave the sum at about 1.16, for a second copy of the down matrices,
an input that has to be recognised, and a second route. A gate of MoLE's form is twelve small operations per block, .15 of a
step in all; taking out five of them (as a trial, with other results) gained .04.
"""
FACTORS = """
`factors`, what `mole train` teaches by default, sits at every layer, and its factors are kept until something changes.
(Asked anew at every step they took 2.07 [1.99, 2.35] and 2.11 [2.07, 2.26] of the base at 3 and 8 LoRAs, 25 rounds.)
Beside the sum and `mole` in one run (`--size thin --rank 4 --arms base again sum mole gated --gates factors --experts 3 8
16 --repeats ROUNDS`, as above; on the machine of the table of binding, beside a training):

| gates | N | x base |
|---|---|---|
"""
STEPS = """
## Steps at real size

`python -m benchmarks --threads 1 --clock cpu --dtype bf16 --pixels 256 --size sd15` (or `sdxl`), with `--arms`, `--experts`
and `--gates` as the tables say.
"""
BINDING = """
## Binding

Each LoRA on a word and in a part of the picture of its own, beside the same gates without (`--arms sum mole "bound sum"
"bound mole"`): dispatch (`--size thin --rank 4`, 150 rounds in each of two runs, on another machine than above whose
other core was idle), and a step of Stable Diffusion 1.5 at 256 pixels in bf16, two threads, by the wall clock. "More" is
the median over rounds of the two ratios' difference; of dispatch its standard error is about .017, so what is near the
goal is not told from it. "Before", 150 rounds after the first run: masks by token that each layer looked at anew, and
biases of cross-attention that diffusers repeats for every head at every step, 210 operations more with the sum and 162
with `mole`; now 24 and 7, by the same test.

| | gates | N | not bound | bound | more | before |
|---|---|---|---|---|---|---|
"""
ONCE = """
## Once, and memory

The same command with `--what attach`, `update`, `collapse` or `memory`.

| | measured | goal |
|---|---|---|
"""
GOALS = {"sum": 1.15, "mole": 1.20, "flow": 1.25}
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


def reuse() -> str:
    """What `mixture.every(k)` changes in a picture."""
    (result,) = load("reuse.json")
    text = """
## Gates evaluated less often

`mixture.every(k)` evaluates the gates in one of k steps and keeps their weights in the others. What it changes in a picture
of the embedded world (`benchmarks/reuse.py`: trained gates per token, 20 steps, mean absolute difference of values in 0..1):

| | difference |
|---|---|
"""
    return text + "".join(f"| {name} | {value:.4f} |\n" for name, value in result["means"].items())


def document() -> str:
    """The whole page."""
    return HEAD + DISPATCH + dispatch() + ABOUT_DISPATCH + factors() + binding() + steps() + once() + reuse()


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


def main() -> None:
    """Write the page and its figure."""
    (HERE / "speed.md").write_text(document())
    curve([cost for cost in costs(load("dispatch.json")[0]) if cost.arm in ("set_adapters", *GOALS)], HERE / "speed.png")


if __name__ == "__main__":
    main()
