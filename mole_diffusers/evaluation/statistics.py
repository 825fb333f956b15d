"""Bootstrap intervals of an evaluation: pure functions. G cases (compositions), S seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Resampler = Callable[[int, torch.Generator], torch.Tensor]  # a number of draws -> how often each case is drawn, [draws, G]


def resample_cases(count: int) -> Resampler:
    """Draw as many cases as there are, with replacement, as if they were independent (Efron, 1979)."""
    return lambda draws, generator: _counts(count, draws, generator)


def resample_concepts(concepts: Sequence[Sequence[str]]) -> Resampler:
    """Draw concepts instead of the cases that share them (pigeonhole bootstrap; Owen, AoAS 2007).

    A case counts as often as all its concepts were drawn together: the product of their counts. The intervals err on the
    wide side.

    Args:
        concepts: those of each of the G cases.
    """
    names = list(dict.fromkeys(name for case in concepts for name in case))
    index = [[names.index(name) for name in case] for case in concepts]

    def resample(draws: int, generator: torch.Generator) -> torch.Tensor:
        counts = _counts(len(names), draws, generator)
        return torch.stack([counts[:, of_case].prod(1) for of_case in index], 1)

    return resample


def bootstrap(table: torch.Tensor, resample: Resampler, *, draws: int = 2000) -> tuple[float, float, float]:
    """The mean over cases of their means over seeds, with its 95 % percentile interval. Seeds are resampled within each
    case.

    Args:
        table: [G, S] values, NaN if a case has fewer seeds than another.
        resample: how to draw cases.
    """
    values, generator = table.double(), torch.Generator().manual_seed(0)
    cases, seeds = table.shape
    weights = resample(draws, generator)
    j = torch.randint(0, seeds, (draws, cases, seeds), generator=generator)
    found = _mean(values[torch.arange(cases)[:, None], j].nanmean(2), weights)  # [draws]
    low, high = torch.nanquantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return _mean(values.nanmean(1)[None], weights.new_ones(1, cases)).item(), low, high


def _counts(count: int, draws: int, generator: torch.Generator) -> torch.Tensor:
    """[draws, count]: how often each of `count` things is drawn in `count` draws with replacement."""
    drawn = torch.randint(0, count, (draws, count), generator=generator)
    return torch.nn.functional.one_hot(drawn, count).sum(1).double()


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over cases that have a value: [draws, G] twice -> [draws], NaN if none has weight."""
    weights = weights * ~values.isnan()
    return (values.nan_to_num() * weights).sum(1) / weights.sum(1)


def as_table(groups: Sequence[Sequence[float]]) -> torch.Tensor:
    """Values by case, of different lengths, as a table [G, S] padded with NaN."""
    width = max(map(len, groups))
    return torch.tensor([[*group, *[float("nan")] * (width - len(group))] for group in groups], dtype=torch.float64)
