"""Intervals of an evaluation: pure functions. G cases (compositions), S seeds.

Pictures of one case are alike, so it is the number of cases that decides how sure a mean is, not that of pictures. No
interval is narrower than so few cases allow. Where they allow none, as for equal measures, both ends are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, nan
from typing import Literal

import torch
from scipy import stats

Estimate = tuple[float, float, float]  # a mean and both ends of its 95 % interval
Kind = Literal["share", "change", "measure"]  # of yes and no; difference of two such values; any other number
EQUAL = 1e-9  # measures that differ by less are equal, up to rounding
ENOUGH = 20  # cases; with fewer, no method is called better than another


def estimate(table: torch.Tensor, units: Sequence[Sequence[str]], kind: Kind) -> Estimate:
    """The mean over cases of their means over seeds, with its 95 % interval.

    The interval is the bootstrap's, widened to that for few cases: Wilson's for shares, and Student's t for measures.

    Args:
        table: [G, S] values, NaN if a case has fewer seeds than another.
        units: those of each case, see `bootstrap`.
        kind: what the values are.
    """
    mean, low, high = bootstrap(table, units)
    cases = table.double().nanmean(1)  # [G]
    cases = cases[~cases.isnan()]
    count = min(len(cases), len({name for own in units for name in own}))
    if kind == "share":
        few = wilson(mean, count)
    elif kind == "change":
        few = _change(cases.clamp(min=0).mean().item(), cases.clamp(max=0).neg().mean().item(), count)
    elif count > 1 and cases.std() > EQUAL:
        half = float(stats.t.ppf(0.975, count - 1)) * cases.std().item() / count**0.5
        few = (mean - half, mean + half)
    else:
        return mean, nan, nan
    return mean, min(few[0], low), max(few[1], high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many. Seeds of a case may disagree: it then counts in part, and the interval
    errs on the wide side.
    """
    z = stats.norm.ppf(0.975)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    return float(middle - half), float(middle + half)


def _change(better: float, worse: float, count: int) -> tuple[float, float]:
    """Interval of `better - worse`, two shares of the same cases, from that of each (Zou and Donner, 2008)."""
    (up_low, up_high), (down_low, down_high) = wilson(better, count), wilson(worse, count)
    change = better - worse
    return change - hypot(better - up_low, down_high - worse), change + hypot(up_high - better, worse - down_low)


def bootstrap(table: torch.Tensor, units: Sequence[Sequence[str]], *, draws: int = 2000) -> Estimate:
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
