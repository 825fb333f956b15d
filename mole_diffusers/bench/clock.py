"""Measuring side by side: every arm in turn, round after round, so that what else the machine does meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

Run = Callable[[], object]


def seconds(run: Run) -> float:
    """How long one call takes, to the end of what it started on a GPU."""
    _settle()
    start = time.perf_counter()
    run()
    _settle()
    return time.perf_counter() - start


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(runs: Mapping[str, Run], *, repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """name -> seconds in each of `repeats` rounds. A round calls every run once, beginning with another one each time."""
    names = list(runs)
    for name in names * warmup:
        runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(runs[name]))
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratios round by round."""
    by_round = torch.tensor([t / b for t, b in zip(times, base, strict=True)], dtype=torch.float64)
    low, middle, high = torch.quantile(by_round, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return middle, low, high
