"""docs/speed.md and docs/speed.png from what `mole bench --json` measured: the files in docs/speed/.

python docs/make_speed.py

Files of one setting hold rounds of the same arms; all their rounds count.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from mole_diffusers.bench.report import curve, share_table
from mole_diffusers.bench.settings import Cost
from mole_diffusers.bench.shares import Share

HERE = Path(__file__).parent
Setting = tuple[str, str, int]  # what, dtype, pixels
Rounds = dict[tuple[str, int], tuple[list[float], list[float]]]  # (arm, N) -> seconds, and the base's beside them

HEAD = """# What a mixture costs

Made by `python docs/make_speed.py` from the files in `docs/speed/`, which `mole bench --json` wrote; do not edit.

All numbers are ratios within one run: every arm runs once in a round, rounds take turns, and a ratio is taken round by
round; medians, with quartiles in brackets. SD 1.5's UNet with random weights, a batch of 2 (guidance), LoRAs of rank 16 on
all attention layers, MoLE's gates per block, on {machine}, which also did other work: time is that of the process itself
(`--clock cpu`), but caches and memory were shared, and two runs of one thing differ by 1 to 3 %. No GPU was at hand; the
same commands measure one.

## The goals

| | goal | measured | |
|---|---|---|---|
"""
GOALS = ((3, 1.02), (8, 1.04), (16, 1.07))
SETTINGS = (("bf16", 256), ("fp32", 256), ("bf16", 512))


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
        first: dict[int, list[float]] = {}
        for row in result["rows"]:
            if "seconds" not in row:
                others[result["what"]].append(row)
                continue
            base = first.setdefault(0 if result["what"] == "step" else row["experts"], row["seconds"])
            ours, theirs = times[result["what"], result["dtype"], result["pixels"]][row["arm"], row["experts"]]
            ours += row["seconds"]
            theirs += base
    return times, others, " and ".join(sorted(machines))


def costs(rounds: Rounds) -> dict[tuple[str, int], Cost]:
    return {key: Cost.of(*key, seconds=seconds, base=base) for key, (seconds, base) in rounds.items()}


def shown(cost: Cost) -> str:
    return f"{cost.ratio:.3f} [{cost.low:.3f}, {cost.high:.3f}]"


def step_goals(times: dict[Setting, Rounds]) -> list[str]:
    lines = []
    for dtype, pixels in SETTINGS:
        found, where = costs(times["step", dtype, pixels]), f"{dtype}, {pixels} px"
        for n, goal in GOALS:
            if cost := found.get(("gated", n)):
                lines.append(goal_line(f"gated step / base step, N={n}, {where}", goal, shown(cost), cost.ratio))
        for n in (3, 8):
            ours, theirs = (found[arm, n].ratio - 1 for arm in ("gated", "set_adapters"))
            said = f"{ours:.3f} / {theirs:.3f} = {ours / theirs:.2f}"
            lines.append(goal_line(f"overhead / that of `set_adapters`, N={n}, {where}", 0.25, said, ours / theirs))
    return lines


def once_goals(times: dict[Setting, Rounds]) -> list[str]:
    lines = []
    rest = (
        ("step", ("collapsed", 3), "collapsed / base, N=3 (1.00 within noise)", 1.02),
        ("step", ("collapsed", 8), "collapsed / base, N=8 (1.00 within noise)", 1.02),
        ("collapse", ("collapse static", 3), "folding static gates / 30 steps of the base, N=3", 0.02),
        ("collapse", ("collapse prompt", 3), "folding gates of a prompt / 30 steps of the base, N=3", 0.02),
        ("attach", ("attach", 8), "attach / diffusers' loading, N=8", 1.0),
        ("update", ("update", 3), "an update of the gates / forward and backward of the frozen base, N=3", 1.15),
    )
    for what, arm, about, goal in rest:
        cost = costs(times[what, "bf16", 256])[arm]
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
    for dtype, pixels in SETTINGS:
        found = sorted(costs(times["step", dtype, pixels]).values(), key=lambda c: (c.experts, c.ratio))
        lines += [
            f"\n### {dtype}, {pixels} pixels\n",
            "| arm | N | ms | x base | quartiles | rounds |",
            "|---|---|---|---|---|---|",
        ]
        for c in found:
            quartiles = f"{c.low:.3f} - {c.high:.3f}"
            lines.append(f"| {c.arm} | {c.experts or ''} | {c.ms:.0f} | {c.ratio:.3f} | {quartiles} | {len(c.seconds)} |")
    return lines


def main() -> None:
    times, others, machine = load()
    drawn = [c for c in costs(times["step", "bf16", 256]).values() if c.arm in ("set_adapters", "gated", "gated-strongest")]
    curve(drawn, HERE / "speed.png")
    rows = [Share(**row) for row in others["shares"]]
    text = HEAD.format(machine=machine) + "\n".join(step_goals(times) + once_goals(times) + memory_goals(others["memory"]))
    text += STEPS + "\n".join(steps(times)) + SHARES + share_table(rows) + REST
    for name, value in json.loads((HERE / "speed" / "reuse.json").read_text())["means"].items():
        text += f"| {name} | {value:.4f} |\n"
    (HERE / "speed.md").write_text(text)


if __name__ == "__main__":
    main()
