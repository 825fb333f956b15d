"""One denoiser step of every arm, in time against the base's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch._dynamo

from benchmarks.arms import ARMS, FOLDING, twin
from benchmarks.clock import interleaved, seconds
from benchmarks.hosts import inputs, lora_files
from benchmarks.settings import COMPILED, Cost, Settings


@torch.no_grad()
def step_costs(settings: Settings, arms: Sequence[str], experts: Sequence[int]) -> list[Cost]:
    """Measure `arms` (see `arms.ARMS`) with each number of experts side by side; the base comes first."""
    if unknown := set(arms) - set(ARMS):
        raise ValueError(f"unknown arms {sorted(unknown)}; known: {list(ARMS)}")
    pipe, wanted = settings.host(), [("base", 0), *((arm, n) for n in experts for arm in arms if arm != "base")]
    given = inputs(pipe, settings.size, pixels=settings.side)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        files = lora_files(pipe.unet, Path(folder), max(experts), rank=settings.rank)
        # All arms share the code of the host's blocks, and each may have as many graphs of it as a host alone.
        limit = torch._dynamo.config.recompile_limit * len(wanted)
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=limit))
        measures = {}
        for arm, n in wanted:
            other = twin(pipe, own=arm in FOLDING)
            changed = stack.enter_context(ARMS[arm](other, dict(list(files.items())[:n]), settings.gates)) or {}
            COMPILED[settings.compile](other.unet)
            measures[f"{arm} {n}"] = partial(seconds, partial(other.unet, **given | changed), clock=settings.clock)
        times = interleaved(measures, repeats=settings.repeats, warmup=2)  # a text is kept when it comes again
    return [Cost.of(arm, n, seconds=times[f"{arm} {n}"], base=times["base 0"]) for arm, n in wanted]
