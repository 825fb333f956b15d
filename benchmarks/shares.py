"""Where a step's time goes: by operator, the base beside the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.arms import ARMS, FOLDING, twin
from benchmarks.clock import median
from benchmarks.hosts import inputs, lora_files
from benchmarks.settings import Settings


@dataclass(frozen=True)
class Share:
    """One operator's calls in a step and its own time, the median of the rounds."""

    arm: str
    experts: int
    operator: str
    calls: int
    ms: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def step_shares(settings: Settings, arms: Sequence[str], experts: Sequence[int]) -> list[Share]:
    """Profile one step of the base and of `arms` (see `arms.ARMS`) with each number of experts, on the CPU."""
    pipe, wanted = settings.host(), [("base", 0), *((arm, n) for n in experts for arm in arms if arm != "base")]
    given, rows = inputs(pipe, settings.size, pixels=settings.side), []
    with TemporaryDirectory() as folder, ExitStack() as stack:
        files, runs = lora_files(pipe.unet, Path(folder), max(experts), rank=settings.rank), {}
        for arm, n in wanted:
            other = twin(pipe, own=arm in FOLDING)
            changed = stack.enter_context(ARMS[arm](other, dict(list(files.items())[:n]), settings.gates)) or {}
            runs[arm, n] = partial(other.unet, **given | changed)
        rounds: dict[tuple[str, int], list[dict[str, tuple[int, float]]]] = defaultdict(list)
        for turn in range(2 + settings.repeats):
            for key, run in runs.items():
                one = _profiled(run)
                if turn >= 2:
                    rounds[key].append(one)
    for (arm, n), found in rounds.items():
        for operator in sorted({name for one in found for name in one}):
            calls = max(one.get(operator, (0, 0.0))[0] for one in found)
            rows.append(Share(arm, n, operator, calls, median([one.get(operator, (0, 0.0))[1] for one in found])))
    return rows


def _profiled(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """operator -> calls, and ms of its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {e.key: (e.count, e.self_cpu_time_total / 1000) for e in profile.key_averages() if e.key.startswith("aten::")}
