"""One denoiser step of every arm, in time against the base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mole_diffusers.bench.arms import ARMS, FOLDING, twin
from mole_diffusers.bench.clock import interleaved, ratio
from mole_diffusers.bench.hosts import SIZES, inputs, lora_files
from mole_diffusers.gates import GateConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILED: dict[str, Callable[[Any], None]] = {
    "no": lambda unet: None,
    "whole": lambda unet: unet.compile(fullgraph=True),
    "blocks": lambda unet: unet.compile_repeated_blocks(fullgraph=True),
}


@dataclass(frozen=True)
class Settings:
    """What to measure on.

    Attributes:
        size: of the host, one of `hosts.SIZES`.
        dtype: one of DTYPES.
        pixels: side of the picture; 0 is the host's usual one.
        rank: of each LoRA, which have all attention layers.
        repeats: rounds; in each every arm runs once.
        compile: "no", the UNet as a "whole", or its repeated "blocks"; without a break in the graph.
        channels_last: memory format of the UNet.
        gates: which gates the arms with gates have.
    """

    size: str = "tiny"
    dtype: str = "fp32"
    pixels: int = 0
    rank: int = 16
    repeats: int = 6
    device: str = "cpu"
    compile: str = "no"
    channels_last: bool = False
    gates: GateConfig = GateConfig("mole")

    def __post_init__(self) -> None:
        for name, known in (("size", SIZES), ("dtype", DTYPES), ("compile", COMPILED)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {list(known)}")
        if self.rank < 1 or self.repeats < 1 or self.pixels % 64:
            raise ValueError(f"rank and repeats must be 1 or more and pixels a multiple of 64: {self}")

    @property
    def side(self) -> int:
        """In pixels."""
        return self.pixels or SIZES[self.size].pixels

    def host(self) -> Any:
        """A new pipeline."""
        pipe = SIZES[self.size].build(DTYPES[self.dtype], self.device)
        if self.channels_last:
            pipe.unet.to(memory_format=torch.channels_last)
        return pipe


@dataclass(frozen=True)
class Cost:
    """One arm's step: its median in milliseconds, and the median and quartiles of its ratio to the base's, by round."""

    arm: str
    experts: int
    ms: float
    ratio: float
    low: float
    high: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def step_costs(settings: Settings, arms: Sequence[str], experts: Sequence[int]) -> list[Cost]:
    """Measure `arms` (see `arms.ARMS`) with each number of experts side by side; the base comes first."""
    if unknown := set(arms) - set(ARMS):
        raise ValueError(f"unknown arms {sorted(unknown)}; known: {list(ARMS)}")
    if not experts or min(experts) < 1:
        raise ValueError(f"the numbers of experts must be 1 or more, got {list(experts)}")
    pipe, wanted = settings.host(), [("base", 0), *((arm, n) for n in experts for arm in arms if arm != "base")]
    given = inputs(pipe, settings.size, pixels=settings.side)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        files = lora_files(pipe.unet, Path(folder), max(experts), rank=settings.rank)
        runs = {}
        for arm, n in wanted:
            other = twin(pipe, own=arm in FOLDING)
            stack.enter_context(ARMS[arm](other, dict(list(files.items())[:n]), settings.gates))
            COMPILED[settings.compile](other.unet)
            runs[f"{arm} {n}"] = partial(other.unet, **given)
        times = interleaved(runs, repeats=settings.repeats)
    return [_cost(arm, n, times[f"{arm} {n}"], times["base 0"]) for arm, n in wanted]


def _cost(arm: str, experts: int, times: Sequence[float], base: Sequence[float]) -> Cost:
    return Cost(arm, experts, 1000 * sorted(times)[len(times) // 2], *ratio(times, base))
