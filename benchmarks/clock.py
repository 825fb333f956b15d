"""Measure things side by side: all in turn, round after round, so that other load on the machine affects all equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Measure = Callable[[], float]  # does something once and returns the seconds it took


def seconds(run: Callable[[], object], *, clock: str) -> float:
    """How long one call takes, including its work on a GPU. "cpu" counts only the time of this process."""
    _settle()
    start = CLOCKS[clock]()
    run()
    _settle()
    return CLOCKS[clock]() - start


def entering(context: AbstractContextManager, *, clock: str) -> float:
    """How long it takes to enter a context. Leaving it does not count."""
    took = seconds(context.__enter__, clock=clock)
    context.__exit__(None, None, None)
    return took


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(measures: Mapping[str, Measure], *, repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """name -> seconds in each of `repeats` rounds. A round runs every measure once, beginning with another one each time."""
    names = list(measures)
    for name in names * warmup:
        measures[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(measures[name]())
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratios of all rounds."""
    middle, low, high = np.quantile(np.divide(times, base), (0.5, 0.25, 0.75)).tolist()
    return middle, low, high
