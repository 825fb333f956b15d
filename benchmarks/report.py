"""Costs as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.settings import Cost


def machine(device: str) -> str:
    """The card's name, or the number of CPU threads in use."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"


def table(costs: Sequence[Any]) -> str:
    """One line per arm and number of experts, without the times of single rounds."""
    return pd.DataFrame(costs).drop(columns="seconds", errors="ignore").to_string(index=False, float_format="{:.3f}".format)


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
