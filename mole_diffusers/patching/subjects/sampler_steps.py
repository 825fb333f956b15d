"""Which step of its sampler a call of the denoiser belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mole_diffusers.gates.unchanged import LastTensor

NOISIEST = 1000  # what schedulers call pure noise


class SamplerSteps:
    """Counts the steps of a sampler by its schedule, whose noise levels are read once: reading waits for the device."""

    def __init__(self) -> None:
        self._schedule = LastTensor()
        self._levels: list[float] = []  # of noise, for each timestep of this schedule

    def begun(self, times: torch.Tensor, timestep: Any, level: Callable[[], float]) -> int:
        """How many steps have begun, including this one. Of those at one noise level, the last counts.

        Args:
            times: the timesteps of the sampler.
            timestep: what the denoiser is given.
            level: of noise in 0..1, called only if `timestep` is not one of `times` itself.
        """
        if not self._schedule.is_again(times):
            self._levels = (times.float() / NOISIEST).tolist()
        index = _position(timestep, times)
        if index is None:  # a copy, which may be rounded
            given = level()
            index = min(range(len(times)), key=lambda i: abs(self._levels[i] - given))
        return sum(each > self._levels[index] - 1e-5 for each in self._levels)


def _position(timestep: Any, times: torch.Tensor) -> int | None:
    """Where a timestep lies in a schedule that it was taken from, without asking its device; None if it was not."""
    is_one = isinstance(timestep, torch.Tensor) and (timestep.numel() == 1 or not any(timestep.stride()))
    if not is_one or not times.is_contiguous():
        return None
    if timestep.dtype != times.dtype or timestep.untyped_storage().data_ptr() != times.untyped_storage().data_ptr():
        return None
    position = int(timestep.storage_offset() - times.storage_offset())
    return position if 0 <= position < len(times) else None
