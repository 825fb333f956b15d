"""Measure how much trained gates help, on pictures from seeds that their training did not use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mole_diffusers import Mixture
from mole_diffusers.training import OBJECTIVES, GateTraining, RandomBatch, TrainingContext, TrainingData

COUNT, ROWS = 4, 8  # seeds, and rows that are measured for each


def seeds(seed: int) -> list[int]:
    """Seeds from which a run with this seed draws no pictures. Its updates choose by seeds of their own, which may be the
    same numbers."""
    return [seed + 1000 + i for i in range(COUNT)]


def losses(pipe: Any, mixture: Mixture, data: TrainingData, config: GateTraining) -> list[Callable[[], float]]:
    """A function per held-out seed that measures the gates in their current state: their error to the teachers' pictures."""

    def measured(seed: int) -> Callable[[], float]:
        context = TrainingContext(pipe, mixture, data, config=replace(config, seed=seed))
        objectives = []
        for name, term in config.parsed.items():
            one = {"seeds": 1, "pictures": 1} if name == "collage" else {"seeds": 1}
            objectives.append(OBJECTIVES[name](context, replace(term, **one)))  # type: ignore[arg-type]

        @torch.no_grad()
        def error() -> float:
            batches = (RandomBatch(torch.Generator().manual_seed(seed), ROWS) for _ in objectives)
            return sum(float(loss(batch)) for loss, batch in zip(objectives, batches, strict=True))

        return error

    return [measured(seed) for seed in seeds(config.seed)]


def verdict(before: Sequence[float], after: Sequence[float]) -> str:
    """One sentence about the errors on held-out seeds before and after training."""
    better = sum(a < b for a, b in zip(after, before, strict=True))
    words = (
        f"on {len(before)} seeds that the training did not see, the error to the teachers' pictures is "
        f"{sum(after) / sum(before):.0%} of what it was before, and lower on {better} of them"
    )
    return words if better > len(before) / 2 else f"{words}; these gates do not help, try more updates or other prompts"
