"""One denoiser step of every arm, in time against the base's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
import torch._dynamo

from benchmarks.arms import entered, own_pipeline
from benchmarks.clock import interleaved, seconds
from benchmarks.settings import COMPILED, Cost, Settings


@torch.no_grad()
def step_costs(settings: Settings, arms: Sequence[str], experts: Sequence[int]) -> list[Cost]:
    """Measure `arms` (see `arms.ARMS`) with each number of experts side by side; the base comes first."""
    wanted = [("base", 0), *((arm, n) for n in experts for arm in arms if arm != "base")]
    with settings.host([0, *experts]) as (pipe, given, files), ExitStack() as stack:
        # All arms share the code of the host's blocks, and each may have as many graphs of it as a host alone.
        limit = torch._dynamo.config.recompile_limit * len(wanted)
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=limit))
        measures = {}
        for arm, n in wanted:
            other = own_pipeline(arm, pipe)
            step = entered(stack, arm, other, files[n], settings.gates, given)
            COMPILED[settings.compile](other.unet)
            measures[f"{arm} {n}"] = partial(seconds, step, clock=settings.clock)
        times = interleaved(measures, repeats=settings.repeats, warmup=2)  # a text is kept when it comes again
    return [Cost.of(arm, n, seconds=times[f"{arm} {n}"], base=times["base 0"]) for arm, n in wanted]
