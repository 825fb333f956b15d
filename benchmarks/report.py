"""Costs as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.memory import Memory
from benchmarks.settings import Cost
from benchmarks.shares import Share


def machine(device: str) -> str:
    """The card's name, or the number of CPU threads in use."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"


def table(costs: Sequence[Cost]) -> str:
    """One line per arm and number of experts."""
    lines = [f"{'arm':<17}{'N':>4}{'ms':>10}{'x base':>9}   quartiles"]
    for c in costs:
        lines.append(f"{c.arm:<17}{c.experts or '':>4}{c.ms:>10.1f}{c.ratio:>9.3f}   {c.low:.3f} - {c.high:.3f}")
    return "\n".join(lines)


def memory_table(rows: Sequence[Memory]) -> str:
    """One line per arm and number of experts."""
    lines = [f"{'arm':<17}{'N':>4}{'MB over base':>14}{'experts':>9}{'ratio':>8}"]
    for r in rows:
        lines.append(f"{r.arm:<17}{r.experts:>4}{r.over / 1e6:>14.1f}{r.own / 1e6:>9.1f}{r.ratio:>8.3f}")
    return "\n".join(lines)


def share_table(rows: Sequence[Share]) -> str:
    """Milliseconds of each operator, one column per arm and number of experts; what takes 1 ms nowhere is left out."""
    columns = list(dict.fromkeys((r.arm, r.experts) for r in rows))
    by_operator: dict[str, dict[tuple[str, int], float]] = {}
    for r in rows:
        by_operator.setdefault(r.operator, {})[r.arm, r.experts] = r.ms
    lines = [f"{'operator':<44}" + "".join(f"{f'{arm} {n}' if n else arm:>18}" for arm, n in columns)]
    for name, found in sorted(by_operator.items(), key=lambda item: -max(item[1].values())):
        if max(found.values()) >= 1:
            lines.append(f"{name:<44}" + "".join(f"{found.get(column, 0):>18.1f}" for column in columns))
    return "\n".join(lines)


def curve(costs: Sequence[Cost], path: Path) -> None:
    """Draw each arm's cost against the number of experts, with its quartiles; needs matplotlib (the extra `plot`)."""
    from matplotlib.figure import Figure

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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
