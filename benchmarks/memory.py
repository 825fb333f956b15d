"""The most memory that a step takes, over what the base takes, against the experts' own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.arms import entered, own_pipeline
from benchmarks.settings import Settings

MARK = "the step that counts"


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step over those of the base, the bytes of the experts' matrices, and their ratio."""

    arm: str
    experts: int
    over: int
    own: int
    ratio: float


@torch.no_grad()
def memory_costs(settings: Settings, arms: Sequence[str], experts: Sequence[int]) -> list[Memory]:
    """Peaks of `arms` (see `arms.ARMS`) with each number of experts; ratio 1 is the experts alone."""
    rows = []
    with settings.host(experts) as (pipe, given, files):
        base = peak(lambda _: partial(pipe.unet, **given), settings.device)
        for n in experts:
            own = sum(tensor.nbytes for path in files[n].values() for tensor in load_file(path).values())
            for arm in (arm for arm in arms if arm != "base"):
                prepare = partial(
                    entered, arm=arm, pipe=own_pipeline(arm, pipe), files=files[n], gates=settings.gates, given=given
                )
                over = peak(prepare, settings.device) - base
                rows.append(Memory(arm, n, over, own, over / own))
    return rows


def peak(prepare: Callable[[ExitStack], Callable[[], object]], device: str) -> int:
    """Bytes allocated between the call of `prepare` and the peak of the fourth call of what it gives, less those freed."""
    gc.collect()  # what is freed meanwhile would count
    with ExitStack() as stack:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            run = prepare(stack)
            for _ in range(3):
                run()
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run = prepare(stack)
            for _ in range(3):
                run()
            with torch.profiler.record_function(MARK):
                run()
        return _highest(profile)


def _highest(profile: Any) -> int:
    """The highest sum of allocations since the profile began, within MARK."""
    events = profile.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == MARK)
    held = highest = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held) if event.start_ns() >= start else held
    return highest
