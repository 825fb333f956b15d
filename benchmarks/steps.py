"""One denoiser step of every arm: its time compared to the base, its memory compared to that of the experts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch._dynamo
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arms import entered, own_pipeline, picture, twin
from benchmarks.clock import interleaved, seconds
from benchmarks.settings import COMPILED, Cost, Settings

MARK = "the step that counts"
WARMUP = 3  # steps until all is kept that follows from a text alone


@torch.no_grad()
def step_costs(settings: Settings, arms: Sequence[str], experts: Sequence[int]) -> list[Cost]:
    """Measure `arms` (see `arms.ARMS`) side by side, with each number of experts. The base comes first.

    With `settings.steps`, a picture in so many is measured instead of a step.
    """
    call = {"num_inference_steps": settings.steps, "num_images_per_prompt": settings.pictures}
    call |= {"width": settings.side, "height": settings.side}
    wanted = [("base", 0), *((arm, n) for n in experts for arm in arms if arm != "base")]
    with settings.host([0, *experts]) as (pipe, given, files), ExitStack() as stack:
        # All arms share the code of the host's blocks. Each may have as many graphs of it as a single host.
        limit = torch._dynamo.config.recompile_limit * len(wanted)
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=limit))
        measures = {}
        for arm, n in wanted:
            other = own_pipeline(arm, pipe)
            if settings.steps:
                step = picture(arm, other, files[n], settings.gates, call)
            else:
                step = entered(stack, arm, other, files[n], settings.gates, given)
            COMPILED[settings.compile](other.unet)
            measures[f"{arm} {n}"] = partial(seconds, step, clock=settings.clock)
        times = interleaved(measures, repeats=settings.repeats, warmup=WARMUP)
    return [Cost.of(arm, n, seconds=times[f"{arm} {n}"], base=times["base 0"]) for arm, n in wanted]


@dataclass(frozen=True)
class Point(Cost):
    """The time of one arm at one place of a curve.

    Attributes:
        curve: what differs along it: "experts", "rank", "pictures" or "steps".
        at: its value here.
    """

    curve: str
    at: int


CURVES: Mapping[str, Sequence[int]] = {
    "experts": (1, 2, 4, 8, 16, 32),
    "rank": (4, 16, 64, 128),
    "pictures": (1, 2, 4, 8),
    "steps": (1, 2, 4, 8, 16, 32),
}


def scaling(settings: Settings, arms: Sequence[str], experts: Sequence[int]) -> list[Point]:
    """Curves of a step against the number of LoRAs, and with the first of `experts` against their rank and the pictures; and
    of a whole picture against its steps.
    """
    points = []
    for curve, places in CURVES.items():
        for at in places:
            here = settings if curve == "experts" else replace(settings, **{curve: at})
            costs = step_costs(here, arms, [at] if curve == "experts" else experts[:1])
            points += [Point(**asdict(cost), curve=curve, at=at) for cost in costs]
    return points


_aten = torch.ops.aten
READS = _aten._local_scalar_dense, _aten.equal, _aten.is_nonzero, _aten.nonzero, _aten.masked_select, _aten._unique2


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do while it is on.

    Attributes:
        count: all operations.
        reads: those that read a value, or whose values say what shape something has: there the CPU waits for a card.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.reads += operation.overloadpacket in READS
        return operation(*args, **kwargs or {})


@dataclass(frozen=True)
class Count:
    """Operations of PyTorch in one step of an arm, how many more these are than the base's, and how many read a value."""

    arm: str
    experts: int
    operations: int
    more: int
    reads: int


@torch.no_grad()
def operation_counts(settings: Settings, arms: Sequence[str], experts: Sequence[int]) -> list[Count]:
    """Count the operations in a step of `arms` (see `arms.ARMS`) with each number of experts. The base comes first."""
    rows: list[Count] = []
    with settings.host([0, *experts]) as (pipe, given, files):
        for arm, n in [("base", 0), *((arm, n) for n in experts for arm in arms if arm != "base")]:
            with ExitStack() as stack:
                step = entered(stack, arm, own_pipeline(arm, twin(pipe)), files[n], settings.gates, given)
                for _ in range(WARMUP):
                    step()
                with Operations() as operations:
                    step()
            more = operations.count - rows[0].operations if rows else 0
            rows.append(Count(arm, n, operations.count, more, operations.reads))
    return rows


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step beyond the base's (`over`), bytes of the experts' matrices (`own`), and their ratio."""

    arm: str
    experts: int
    over: int
    own: int
    ratio: float


@torch.no_grad()
def memory_costs(settings: Settings, arms: Sequence[str], experts: Sequence[int]) -> list[Memory]:
    """Peak memory of `arms` (see `arms.ARMS`) with each number of experts. Ratio 1 means only the experts' matrices."""
    rows = []
    with settings.host(experts) as (pipe, given, files):
        pipe.unet(**given)  # a card's libraries take memory of their own in the first step, and keep it
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
    """Bytes held at the peak of the fourth call of what `prepare` returns, less those held before `prepare` was called."""
    gc.collect()  # garbage freed during the measurement would count
    with ExitStack() as stack:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            run = prepare(stack)
            for _ in range(WARMUP):
                run()
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run = prepare(stack)
            for _ in range(WARMUP):
                run()
            with torch.profiler.record_function(MARK):
                run()
        return _highest(profile)


def _highest(profile: Any) -> int:
    """The highest sum, within MARK, of all allocations since the profile began."""
    events = profile.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == MARK)
    held = highest = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held) if event.start_ns() >= start else held
    return highest
