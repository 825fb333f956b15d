"""Bootstrap intervals of an evaluation: pure functions. G cases (compositions), S seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def bootstrap(table: torch.Tensor, units: Sequence[Sequence[str]], *, draws: int = 2000) -> tuple[float, float, float]:
    """The mean over cases of their means over seeds, with its 95 % percentile interval.

    As many units as there are are drawn with replacement. A case counts as often as all its units were drawn together:
    the product of their counts. Seeds are resampled within each case.

    Args:
        table: [G, S] values, NaN if a case has fewer seeds than another.
        units: those of each case. With its own name, cases are drawn as if they were independent (Efron, 1979). With its
            concepts, cases that share one are drawn together (pigeonhole bootstrap; Owen, AoAS 2007), and the interval
            errs on the wide side.
    """
    values, generator = table.double(), torch.Generator().manual_seed(0)
    cases, seeds = table.shape
    names = list(dict.fromkeys(name for own in units for name in own))
    drawn = torch.randint(0, len(names), (draws, len(names)), generator=generator)
    counts = torch.nn.functional.one_hot(drawn, len(names)).sum(1).double()  # [draws, units]
    weights = torch.stack([counts[:, [names.index(name) for name in own]].prod(1) for own in units], 1)  # [draws, G]
    j = torch.randint(0, seeds, (draws, cases, seeds), generator=generator)
    found = _mean(values[torch.arange(cases)[:, None], j].nanmean(2), weights)  # [draws]
    low, high = torch.nanquantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return _mean(values.nanmean(1)[None], weights.new_ones(1, cases)).item(), low, high


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over cases that have a value: [draws, G] twice -> [draws], NaN if none has weight."""
    weights = weights * ~values.isnan()
    return (values.nan_to_num() * weights).sum(1) / weights.sum(1)


def as_table(groups: Sequence[Sequence[float]]) -> torch.Tensor:
    """Values by case, of different lengths, as a table [G, S] padded with NaN."""
    width = max(map(len, groups))
    return torch.tensor([[*group, *[float("nan")] * (width - len(group))] for group in groups], dtype=torch.float64)
