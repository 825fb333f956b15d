"""LoHa, LoKr and Tucker convolutions as up @ down: exact, then cut to a rank by singular values with the error stated.

Names as in LyCORIS (Yeh et al., 2024). Everything is fp32; a convolution's Cin and taps are one axis, I = Cin k k.
"""

from __future__ import annotations

import torch

Factors = tuple[torch.Tensor, torch.Tensor]  # up [O, R], down [R, I]


def tucker_down(core: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """core [r, s, k, k], down [s, Cin] -> [r, Cin, k, k]: the first two of a convolution's three factors in one."""
    return torch.einsum("rskl,si->rikl", core, down)


def hadamard(first: Factors, second: Factors) -> Factors:
    """(U1 D1) * (U2 D2) elementwise, which is LoHa, has rank r1 r2: the products of all pairs of columns and of rows."""
    (up1, down1), (up2, down2) = first, second
    up = up1[:, :, None] * up2[:, None, :]  # [O, r1, r2]
    down = down1[:, None, :] * down2[None, :, :]  # [r1, r2, I]
    return up.flatten(1), down.flatten(0, 1)


def singular(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [O, q], singular values [q] and V [q, I] of up @ down, which is never formed.

    They are those of the small core between the orthogonal factors of both.
    """
    left, core_left = torch.linalg.qr(up)  # [O, p], [p, R]
    right, core_right = torch.linalg.qr(down.T)  # [I, r], [r, R]
    u, values, v = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return left @ u, values, v @ right.T


def cut(up: torch.Tensor, down: torch.Tensor, tolerance: float) -> tuple[Factors, float]:
    """The smallest rank whose relative Frobenius error is within `tolerance`, and that error."""
    u, values, v = singular(up, down)
    rank, error = _rank(values, tolerance)
    return (u[:, :rank] * values[:rank], v[:rank]), error


def kronecker(first: Factors, second: Factors, tolerance: float) -> tuple[Factors, float]:
    """W1 [a, b] (x) W2 [c, D], which is LoKr, each as factors, -> up [a c, R], down [R, b D], cut as `cut` does.

    Its singular values are all products of one of W1's and one of W2's, its vectors their Kronecker products, so the
    large matrix is never decomposed.
    """
    u1, values1, v1 = singular(*first)
    u2, values2, v2 = singular(*second)
    values, order = torch.outer(values1, values2).flatten().sort(descending=True)
    rank, error = _rank(values, tolerance)
    i, j = order[:rank] // len(values2), order[:rank] % len(values2)
    up = u1[:, None, i] * u2[None, :, j] * values[:rank]  # [a, c, R]
    down = v1[i, :, None] * v2[j, None, :]  # [R, b, D]
    return (up.flatten(0, 1), down.flatten(1)), error


def _rank(values: torch.Tensor, tolerance: float) -> tuple[int, float]:
    """How many of the falling singular values to keep, at least one, and the relative error of leaving out the rest."""
    energy = values.double() ** 2
    left = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])  # [R + 1], energy behind each rank
    errors = (left / left[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    rank = max(1, int((errors > tolerance).sum()))
    return rank, float(errors[rank])
