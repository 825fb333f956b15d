"""Settings of a measurement, and its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.clock import ratio
from benchmarks.hosts import SIZES, inputs, lora_files
from mole_diffusers.gates import GateConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILED: dict[str, Callable[[Any], None]] = {
    "no": lambda unet: None,
    "whole": lambda unet: unet.compile(fullgraph=True),
    "graphs": lambda unet: unet.compile(fullgraph=True, mode="reduce-overhead"),
    "blocks": lambda unet: unet.compile_repeated_blocks(fullgraph=True),
}
Files = Mapping[str, Path]


@dataclass(frozen=True)
class Settings:
    """What to measure on.

    Attributes:
        size: the host's size, one of `hosts.SIZES`.
        dtype: one of DTYPES.
        pixels: the side of the picture; 0 means the host's usual one.
        rank: the rank of each LoRA. They cover all attention layers.
        repeats: the number of rounds. Every arm runs once per round.
        compile: "no", "whole" for the whole UNet, "graphs" for the same in CUDA graphs, or "blocks" for its repeated blocks.
            Graph breaks are not allowed.
        clock: "wall", or "cpu" for the time of this process only, if other work shares its core.
        gates: the gates of the arms that have gates.
        pictures: how many are drawn at once. With guidance, the batch is twice as large.
        steps: of a whole call of the pipeline; 0 measures a step alone.
    """

    size: str = "tiny"
    dtype: str = "fp32"
    pixels: int = 0
    rank: int = 16
    repeats: int = 6
    device: str = "cpu"
    compile: str = "no"
    clock: str = "wall"
    gates: GateConfig = GateConfig("mole")
    pictures: int = 1
    steps: int = 0

    def __post_init__(self) -> None:
        if min(self.rank, self.repeats, self.pictures) < 1 or self.pixels % 64:
            raise ValueError(f"rank, repeats and pictures must be 1 or more and pixels a multiple of 64: {self}")

    @property
    def side(self) -> int:
        """The side of the picture in pixels."""
        return self.pixels or SIZES[self.size].pixels

    @contextmanager
    def host(self, counts: Sequence[int]) -> Iterator[tuple[Any, dict[str, Any], dict[int, Files]]]:
        """A new pipeline, the arguments for its denoiser, and for each of these counts the files of that many LoRAs."""
        pipe = SIZES[self.size].build(DTYPES[self.dtype], self.device)
        with TemporaryDirectory() as folder:
            files = lora_files(pipe.unet, Path(folder), max(counts), rank=self.rank)
            given = inputs(pipe, pixels=self.side, pictures=self.pictures)
            yield pipe, given, {n: dict(list(files.items())[:n]) for n in counts}


@dataclass(frozen=True)
class Cost:
    """The time of one arm: in each round, its median, and median and quartiles of its ratio to the base by round."""

    arm: str
    experts: int
    seconds: list[float]
    ms: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, arm: str, experts: int, *, seconds: list[float], base: list[float]) -> Cost:
        return cls(arm, experts, seconds, 1000 * median(seconds), *ratio(seconds, base))
