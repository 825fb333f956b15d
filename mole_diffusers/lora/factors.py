"""LoHa and LoKr as up @ down: exact, then cut to a lower rank with the error stated.

Names as in LyCORIS (Yeh et al., 2024). Everything is fp32; a convolution's Cin and kernel are one axis, I = Cin k k.
"""

from __future__ import annotations

import torch

from mole_diffusers.functional import low_rank

FactorPair = tuple[torch.Tensor, torch.Tensor]  # up [O, R], down [R, I]


def hadamard(first: FactorPair, second: FactorPair) -> FactorPair:
    """(U1 D1) * (U2 D2) elementwise (LoHa). It has rank r1 r2: the products of all pairs of columns and of rows."""
    (up1, down1), (up2, down2) = first, second
    up = up1[:, :, None] * up2[:, None, :]  # [O, r1, r2]
    down = down1[:, None, :] * down2[None, :, :]  # [r1, r2, I]
    return up.flatten(1), down.flatten(0, 1)


def cut(up: torch.Tensor, down: torch.Tensor, tolerance: float) -> tuple[FactorPair, float]:
    """The pair of the smallest rank whose relative Frobenius error is within `tolerance`, and that error."""
    down, up, values = low_rank(down, up)
    rank, error = _smallest_rank(values, tolerance)
    return (up[:, :rank], down[:rank]), error


def kronecker(first: FactorPair, second: FactorPair, tolerance: float) -> tuple[FactorPair, float]:
    """W1 [a, b] (x) W2 [c, D] (LoKr), each given as factors -> up [a c, R], down [R, b D], cut as in `cut`.

    Its singular values are products of one of W1's and one of W2's, and its vectors are their Kronecker products. So the
    large matrix itself is never decomposed.
    """
    (down1, up1, values1), (down2, up2, values2) = (low_rank(down, up) for up, down in (first, second))
    values, order = torch.outer(values1, values2).flatten().sort(descending=True)
    rank, error = _smallest_rank(values, tolerance)
    i, j = order[:rank] // len(values2), order[:rank] % len(values2)
    up = up1[:, None, i] * up2[None, :, j]  # [a, c, R]
    down = down1[i, :, None] * down2[j, None, :]  # [R, b, D]
    return (up.flatten(0, 1), down.flatten(1)), error


def _smallest_rank(values: torch.Tensor, tolerance: float) -> tuple[int, float]:
    """How many of the descending singular values to keep, at least one, and the relative error of dropping the rest."""
    energy = values.double() ** 2
    dropped = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])  # [R + 1], energy beyond each rank
    errors = (dropped / dropped[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    rank = max(1, int((errors > tolerance).sum()))
    return rank, float(errors[rank])
