"""docs/speed.md and docs/speed.png from what `python -m benchmarks --json` measured: the files in docs/speed/.

python docs/make_speed.py

Files of one setting hold rounds of the same arms; all their rounds count.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import curve, share_table
from benchmarks.settings import Cost
from benchmarks.shares import Share

HERE = Path(__file__).parent


class Setting(NamedTuple):
    """What rounds must have in common."""

    what: str
    size: str = "sd15"
    dtype: str = "bf16"
    pixels: int = 256
    compile: str = "no"
    channels_last: bool = False
    gates: str = "mole"

    def __str__(self) -> str:
        compiled = {"no": "", "whole": ", compiled whole", "blocks": ", repeated blocks compiled"}[self.compile]
        gates = "" if self.gates == "mole" else f", `{self.gates}` gates"
        return f"{NAMES[self.size]}, {self.dtype}, {self.pixels} px{gates}{compiled}{', channels last' * self.channels_last}"


Rounds = dict[tuple[str, int], tuple[list[float], list[float]]]  # (arm, N) -> seconds, and the base's beside them

HEAD = """# What a mixture costs

Made by `python docs/make_speed.py` from the files in `docs/speed/`, which `python -m benchmarks --json` wrote; do not edit.

All numbers are ratios within one run: every arm runs once in a round, rounds take turns, and a ratio is taken round by
round; medians, with quartiles in brackets. The UNet of Stable Diffusion 1.5, or of SDXL, with random weights, a batch of 2
(guidance), LoRAs of rank 16 on all attention layers, MoLE's gates per block unless others are named; {machine} of a machine
that did other work, too: time is the process's own (`--clock cpu`), but caches and memory were shared; the arm `again`, the
base once more, says how much is noise. No GPU was at hand; the same commands measure one.

## The goals

| | goal | measured | |
|---|---|---|---|
"""
STEPS = """

## Steps

| arm | what it is |
|---|---|
| `base` | no LoRA; `again` is the base once more, so that what it differs from 1 is noise |
| `set_adapters` | diffusers' own stacking of the N LoRAs, weights 1, no gates |
| `fused` | diffusers' own merging into the weights; no gate can act any more |
| `gated` | gates, each layer in the cheaper of its two ways, the text's products kept from step to step |
| `gated-new-text` | the same over a text that is another one at every step, so that nothing of it can be kept |
| `gated-beside`, `gated-inside` | every layer beside the host's product; every layer but the text's inside its weight |
| `gated-strongest` | the four largest gates of each row weigh something, and the others are not computed |
| `collapsed` | the gates' average folded into the weights by `mixture.collapsed(prompt)` |

![Cost of a step against the number of LoRAs](speed.png)
"""
SHARES = """

## Where the time goes

Milliseconds of each operator in one step (`python -m benchmarks --what shares`, bf16, 256 pixels).

- What gates and experts add: `baddbmm` writes a weight for each row (layers of 320 channels at 256 pixels), and `bmm` stands
  for the host's `mm` and `addmm` there; `addmm_` and smaller `mm` go down and up beside the host's product (640 and 1280
  channels). q, k and v go down in one `mm`.
- What is saved: the products of the text, 32 of the 184 linear layers, are not made again while the text is the same.
  All matrix products together: {products}.
- Convolutions, attention over tokens and normalisation are the host's own calls and the same in every arm. They differ
  between columns by more than all the experts' products, as the base does from itself (`again`): that is noise, and what is
  left over the floor is not more than it.
- Gates that differ from token to token (`flow`) leave no weight per row to fold into, so every layer goes beside the host's
  product, and each token's ranks have factors of their own. By the shapes that is 4.9 % more multiplications at 8 LoRAs
  and 256 pixels, less 1.6 % for the text, so the goal leaves hardly anything for the rest. Where that counts, collapse.
- Memory beyond the experts' own is that of the gates and of what is kept of the text, 8 MB.
  That saves 0.01 to 0.02 of every step: without it, see `gated-new-text`. So the memory goal is given up for that of time.

```
"""
REST = """
```

## Gates asked less often

`mixture.every(k)` asks the gates in one of k steps and lets their weights stand in the others. What it changes in a picture
of the embedded world (`benchmarks/reuse.py`: trained gates per token, 20 steps, mean absolute difference of values in 0..1):

| | difference |
|---|---|
"""
DRAWN = ("set_adapters", "gated", "gated-new-text", "gated-strongest", "collapsed")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
GOALS = ((3, 1.02), (8, 1.04), (16, 1.07))
GOAL_SETTINGS = [Setting("step", dtype=dtype, pixels=pixels) for dtype in ("bf16", "fp32") for pixels in (256, 512)]
NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
STEP = Setting("step")
SETTINGS = (
    STEP,
    STEP._replace(dtype="fp32"),
    STEP._replace(pixels=512),
    STEP._replace(dtype="fp32", pixels=512),
    STEP._replace(size="sdxl", pixels=512),
    STEP._replace(gates="flow"),
    STEP._replace(gates="rank"),
    STEP._replace(channels_last=True),
    STEP._replace(compile="blocks"),
    STEP._replace(compile="whole"),
)


def load() -> tuple[dict[Setting, Rounds], dict[str, list[dict[str, Any]]], str]:
    """Rounds by setting, the rows that are not times, and the machine."""
    times: dict[Setting, Rounds] = defaultdict(lambda: defaultdict(lambda: ([], [])))
    others: dict[str, list[dict[str, Any]]] = defaultdict(list)
    machines = set()
    for path in sorted((HERE / "speed").glob("*.json")):
        result = json.loads(path.read_text())
        if "rows" not in result:
            continue
        machines.add(result["machine"])
        setting = Setting(*(result[name] for name in Setting._fields))
        first: dict[int, list[float]] = {}
        for row in result["rows"]:
            if "seconds" not in row:
                others[result["what"]].append(row)
                continue
            base = first.setdefault(0 if result["what"] == "step" else row["experts"], row["seconds"])
            ours, theirs = times[setting][row["arm"], row["experts"]]
            ours += row["seconds"]
            theirs += base
    return times, others, " and ".join(sorted(machines))


def costs(rounds: Rounds) -> dict[tuple[str, int], Cost]:
    return {key: Cost.of(*key, seconds=seconds, base=base) for key, (seconds, base) in rounds.items()}


def shown(cost: Cost) -> str:
    return f"{cost.ratio:.3f} [{cost.low:.3f}, {cost.high:.3f}]"


def step_goals(times: dict[Setting, Rounds]) -> list[str]:
    lines = []
    for setting in SETTINGS:
        found = costs(times[setting])
        for n, goal in GOALS:
            about = f"gated step / base step, N={n}, {setting}"
            if cost := found.get(("gated", n)):
                lines.append(goal_line(about, goal, shown(cost), cost.ratio))
            elif setting in GOAL_SETTINGS:
                lines.append(f"| {about} | <= {goal} | not measured | |")
        for n in (3, 8):
            if theirs := found.get(("set_adapters", n)):
                ours, over = found["gated", n].ratio - 1, theirs.ratio - 1
                said = f"{ours:.3f} / {over:.3f} = {ours / over:.3f}"
                lines.append(goal_line(f"overhead / that of `set_adapters`, N={n}, {setting}", 0.25, said, ours / over))
    return lines


def noise_goals(times: dict[Setting, Rounds]) -> list[str]:
    """Folded gates must cost nothing: their quartiles and those of the base measured twice must overlap."""
    found, lines = costs(times[STEP]), []
    for n in (3, 8):
        ours, again = found["collapsed", n], found["again", n]
        verdict = "met" if ours.low <= again.high and again.low <= ours.high else "**not met**"
        lines.append(f"| collapsed / base, N={n} | that of `again`, {shown(again)} | {shown(ours)} | {verdict} |")
    return lines


def once_goals(times: dict[Setting, Rounds]) -> list[str]:
    lines = []
    rest = (
        ("collapse", ("collapse static", 3), "folding static gates / 30 steps of the base, N=3", 0.02),
        ("collapse", ("collapse prompt", 3), "folding gates of a prompt / 30 steps of the base, N=3", 0.02),
        ("attach", ("attach", 8), "attach / diffusers' loading, N=8", 1.0),
        ("update", ("update", 3), "an update of the gates / forward and backward of the frozen base, N=3", 1.15),
    )
    for what, arm, about, goal in rest:
        cost = costs(times[Setting(what)])[arm]
        lines.append(goal_line(about, goal, shown(cost), cost.ratio))
    return lines


def memory_goals(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row["experts"] == 8:
            said = f"{row['over'] / 1e6:.1f} MB / {row['own'] / 1e6:.1f} MB = {row['ratio']:.2f}"
            about = f"peak memory over the base / the experts' own, N=8, {row['arm']}"
            lines.append(goal_line(about, 1.05, said, row["ratio"]))
    return lines


def goal_line(about: str, goal: float, said: str, value: float) -> str:
    return f"| {about} | <= {goal} | {said} | {'met' if value <= goal else '**not met**'} |"


def steps(times: dict[Setting, Rounds]) -> list[str]:
    lines = []
    for setting in filter(times.get, SETTINGS):
        found = sorted(costs(times[setting]).values(), key=lambda c: (c.experts, c.ratio))
        lines += [
            f"\n### {setting}\n",
            "| arm | N | ms | x base | quartiles | rounds |",
            "|---|---|---|---|---|---|",
        ]
        for c in found:
            quartiles = f"{c.low:.3f} - {c.high:.3f}"
            lines.append(f"| {c.arm} | {c.experts or ''} | {c.ms:.0f} | {c.ratio:.3f} | {quartiles} | {len(c.seconds)} |")
    return lines


def products(shares: list[Share]) -> str:
    """How long a step's matrix products take, arm by arm."""
    took: dict[tuple[str, int], float] = defaultdict(float)
    for share in shares:
        took[share.arm, share.experts] += share.ms * (share.operator in PRODUCTS)
    return ", ".join(f"{ms:.0f} ms {f'with {n} LoRAs' if n else 'in the base'}" for (_, n), ms in took.items())


def document() -> str:
    times, others, machine = load()
    goals = step_goals(times) + noise_goals(times) + once_goals(times) + memory_goals(others["memory"])
    text = HEAD.format(machine=machine) + "\n".join(goals) + STEPS + "\n".join(steps(times))
    shares = [Share(**row) for row in others["shares"]]
    text += SHARES.format(products=products(shares)) + share_table(shares) + REST
    reuse = json.loads((HERE / "speed" / "reuse.json").read_text())["means"]
    return text + "".join(f"| {name} | {value:.4f} |\n" for name, value in reuse.items())


def main() -> None:
    (HERE / "speed.md").write_text(document())
    found = costs(load()[0][STEP])
    curve([c for (arm, _), c in found.items() if arm in DRAWN], HERE / "speed.png")


if __name__ == "__main__":
    main()
