"""Merges that drop entries: TIES, DARE, KnOTS. Results have full rank, for KnOTS the summed rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mole_diffusers.merging.factors import Layer, Layers, Merged, Pair, concatenated, dense, present

Deltas = dict[str, list[torch.Tensor | None]]  # layer -> one matrix per expert


def ties(layers: Layers, *, share: float = 0.2, scale: float = 1.0) -> Merged:
    """TIES (Yadav et al., 2023) on delta W: trim, elect a sign per entry, average what agrees with it.

    Args:
        share: of each expert's entries to keep, the largest over the whole model as in the paper (peft trims layer by
            layer).
        scale: of the result; the paper's lambda.
    """
    elected = _elected(_trimmed(_deltas(layers), share))
    return {key: dense(scale * delta) for key, delta in elected.items()}


def dare(layers: Layers, *, drop: float = 0.9, elect: bool = False, seed: int = 0) -> Merged:
    """DARE (Yu et al., 2023) on delta W: drop entries at random, rescale the rest by 1 / (1 - drop), then add.

    Args:
        drop: share of entries that is dropped, below 1.
        elect: combine by TIES' signs and means instead of the sum.
        seed: of the masks.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"DARE's drop must be at least 0 and below 1, got {drop}")
    generator = torch.Generator().manual_seed(seed)
    kept: Deltas = {}
    for key, deltas in _deltas(layers).items():
        kept[key] = [
            None if d is None else d * (torch.rand(d.shape, generator=generator) >= drop) / (1 - drop) for d in deltas
        ]
    if elect:
        return {key: dense(delta) for key, delta in _elected(kept).items()}
    return {key: dense(torch.stack(_there(deltas)).sum(0)) for key, deltas in kept.items()}


def knots(layers: Layers, *, share: float = 0.2, scale: float = 1.0) -> Merged:
    """KnOTS-TIES (Stoica et al., 2024): TIES on T_k, where delta W_k = U T_k and U is a basis that all experts share.

    Exact at rank R: U comes from the R x R core of all experts side by side, singular values below 1e-5 left out.
    """
    bases = {key: _basis(layer) for key, layer in layers.items()}
    aligned: Deltas = {
        key: [None if p is None else (bases[key].T @ p.folded().up) @ p.down for p in layer] for key, layer in layers.items()
    }
    return {key: Pair(scale * merged, bases[key]) for key, merged in _elected(_trimmed(aligned, share)).items()}


def _basis(layer: Layer) -> torch.Tensor:
    """U [Cout, m] of the singular value decomposition of [delta_1 | ... | delta_N]."""
    pairs = present(layer)
    q, r = torch.linalg.qr(concatenated(pairs).up)  # [Cout, m], [m, R]
    blocks = r.split([p.rank for p in pairs], 1)
    core = torch.stack([b @ (p.down @ p.down.T) @ b.T for b, p in zip(blocks, pairs, strict=True)]).sum(0)  # [m, m]
    squares, vectors = torch.linalg.eigh(core)
    kept = squares.clamp_min(0).sqrt() > 1e-5
    kept[-1] = True  # a layer that changes nothing has a direction, too
    return q @ vectors[:, kept]


def _deltas(layers: Layers) -> Deltas:
    return {key: [None if p is None else p.delta() for p in layer] for key, layer in layers.items()}


def _there(deltas: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [d for d in deltas if d is not None]


def _trimmed(deltas: Deltas, share: float) -> Deltas:
    """Each expert without its small entries: the threshold is taken over all its layers."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of entries that stays must be above 0 and at most 1, got {share}")
    count = len(next(iter(deltas.values())))
    limits = [_threshold([d[k] for d in deltas.values()], share) for k in range(count)]
    return {
        key: [None if d is None else d * (d.abs() >= limit) for d, limit in zip(row, limits, strict=True)]
        for key, row in deltas.items()
    }


def _threshold(deltas: Sequence[torch.Tensor | None], share: float) -> float:
    sizes = torch.cat([d.abs().flatten() for d in _there(deltas)])
    kept = max(1, round(share * len(sizes)))
    return sizes.kthvalue(len(sizes) - kept + 1).values.item()


def _elected(deltas: Deltas) -> dict[str, torch.Tensor]:
    """Steps 2 and 3 of TIES: the sign of the sum, then the mean of the entries with that sign."""
    sums = {key: torch.stack(_there(row)).sum(0) for key, row in deltas.items()}
    majority = torch.stack([s.sign().sum() for s in sums.values()]).sum().sign()  # where a sum is 0
    out = {}
    for key, row in deltas.items():
        stacked = torch.stack(_there(row))  # [n, Cout, Cin]
        sign = torch.where(sums[key] == 0, majority, sums[key].sign())
        agree = stacked * sign > 0
        out[key] = (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)
    return out
