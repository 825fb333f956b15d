"""Intervals and summaries of an evaluation: pure functions. G cases (compositions), S seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Statistic = Callable[[torch.Tensor], torch.Tensor]  # [D, G, S, ...], D samples of G cases of S seeds -> [D]


def overall(samples: torch.Tensor) -> torch.Tensor:
    """The mean of everything there is: [D, G, S, ...] -> [D]."""
    return samples.flatten(1).nanmean(1)


def bootstrap(
    table: torch.Tensor, statistic: Statistic = overall, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic and its 95 % percentile interval (Efron, 1979), resampling the cases and, within each, the seeds.

    Args:
        table: [G, S, ...] values, NaN where a case has fewer seeds than another.
    """
    generator = torch.Generator().manual_seed(seed)
    cases, seeds = table.shape[:2]
    i = torch.randint(0, cases, (draws, cases, 1), generator=generator)
    j = torch.randint(0, seeds, (draws, cases, seeds), generator=generator)
    found = statistic(table.double()[i, j])  # [draws]
    low, high = torch.nanquantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return statistic(table.double()[None]).item(), low, high


def share(samples: torch.Tensor) -> torch.Tensor:
    """Mean over cases and concepts of the share of seeds: [D, G, S, C] -> [D], NaN where a case has fewer concepts."""
    return samples.nanmean(2).flatten(1).nanmean(1)


def recovery(samples: torch.Tensor) -> torch.Tensor:
    """Mean over cases and concepts of a concept's share of its upper bound, at most 1: [D, G, S, 2, C] -> [D].

    The two are the arm's own and the bound's, on the same seeds; concepts whose bound shows nothing are left out.
    """
    own, bound = samples.nanmean(2).unbind(2)  # [D, G, C]
    return (own / bound.where(bound > 0, torch.nan)).clamp(max=1.0).flatten(1).nanmean(1)


def harmonic(samples: torch.Tensor) -> torch.Tensor:
    """Mean over cases of the harmonic mean over a case's concepts: [D, G, S, C] -> [D]."""
    return harmonic_mean(samples.nanmean(2)).nanmean(1)


def harmonic_mean(shares: torch.Tensor) -> torch.Tensor:
    """n / sum(1 / share): as small as the worst of the concepts asks; 0 where one is 0. [..., C] -> [...], NaN left out."""
    return (~shares.isnan()).sum(-1) / (1 / shares).nansum(-1)


def as_table(groups: Sequence[Sequence[float]]) -> torch.Tensor:
    """Values by case, of different lengths, as [G, S] filled up with NaN."""
    width = max(map(len, groups))
    return torch.tensor([[*group, *[float("nan")] * (width - len(group))] for group in groups], dtype=torch.float64)
