"""Intervals and summaries of an evaluation: pure functions. G cases (compositions), S seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def bootstrap(table: torch.Tensor, *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % percentile interval (Efron, 1979), resampling the cases and, within each, the seeds.

    Args:
        table: [G, S] values, NaN where a case has fewer seeds than another.
    """
    generator = torch.Generator().manual_seed(seed)
    cases, seeds = table.shape
    i = torch.randint(0, cases, (draws, cases, 1), generator=generator)
    j = torch.randint(0, seeds, (draws, cases, seeds), generator=generator)
    means = table.double()[i, j].flatten(1).nanmean(1)  # [draws]
    low, high = torch.nanquantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return table.double().nanmean().item(), low, high


def harmonic_mean(shares: Sequence[float]) -> float:
    """n / sum(1 / share): as small as the worst of the concepts asks; 0 where one is 0."""
    return 0.0 if min(shares) <= 0 else len(shares) / sum(1 / share for share in shares)


def as_table(groups: Sequence[Sequence[float]]) -> torch.Tensor:
    """Values by case, of different lengths, as [G, S] filled up with NaN."""
    width = max(map(len, groups))
    return torch.tensor([[*group, *[float("nan")] * (width - len(group))] for group in groups], dtype=torch.float64)
