"""Merges that drop entries: TIES, DARE, KnOTS. Results have full rank, for KnOTS the summed rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mole_diffusers.merging.factors import Layer, Layers, Merged, Pair, concatenated, dense, present

Keep = Callable[[str, Pair], Pair]  # a layer's key and its result -> what stays in memory of that result


def whole(key: str, pair: Pair) -> Pair:
    """Keep a layer's result as it is."""
    return pair


def ties(layers: Layers, *, share: float = 0.2, scale: float = 1.0, keep: Keep = whole) -> Merged:
    """TIES (Yadav et al., 2023) on delta W: trim, elect a sign per entry, average the entries that agree with it.

    Args:
        share: share of each expert's entries to keep, the largest over the whole model as in the paper (peft trims layer
            by layer).
        scale: of the result; the paper's lambda.
        keep: what to keep of each layer before the next one is multiplied out.
    """
    limits, out = _limits(layers, share), {}
    for key, layer in layers.items():
        out[key] = keep(key, dense(scale * _elected(_trimmed(layer, limits))))
    return out


def dare(layers: Layers, *, drop: float = 0.9, elect: bool = False, seed: int = 0, keep: Keep = whole) -> Merged:
    """DARE (Yu et al., 2023) on delta W: drop entries at random, rescale the rest by 1 / (1 - drop), then add.

    Args:
        drop: share of entries that is dropped, below 1.
        elect: combine by TIES' signs and means instead of the sum.
        seed: of the masks.
        keep: what to keep of each layer before the next one is multiplied out.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"DARE's drop must be at least 0 and below 1, got {drop}")
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, layer in layers.items():
        deltas = [pair.delta() for pair in present(layer)]
        kept = torch.stack([d * (torch.rand(d.shape, generator=generator) >= drop) / (1 - drop) for d in deltas])
        out[key] = keep(key, dense(_elected(kept) if elect else kept.sum(0)))
    return out


def knots(layers: Layers, *, share: float = 0.2, scale: float = 1.0) -> Merged:
    """KnOTS-TIES (Stoica et al., 2024): TIES on T_k, where delta W_k = U T_k and U is a basis that all experts share.

    Exact at rank R: U comes from the R x R core of all experts side by side, without singular values below 1e-5.
    """
    bases = {key: _basis(layer) for key, layer in layers.items()}
    aligned = {
        key: [None if p is None else Pair(p.down, bases[key].T @ p.folded().up) for p in layer]
        for key, layer in layers.items()
    }
    limits = _limits(aligned, share)
    return {key: Pair(scale * _elected(_trimmed(layer, limits)), bases[key]) for key, layer in aligned.items()}


def _basis(layer: Layer) -> torch.Tensor:
    """U [Cout, m] of the singular value decomposition of [delta_1 | ... | delta_N]."""
    pairs = present(layer)
    q, r = torch.linalg.qr(concatenated(pairs).up)  # [Cout, m], [m, R]
    blocks = r.split([p.rank for p in pairs], 1)
    core = torch.stack([b @ (p.down @ p.down.T) @ b.T for b, p in zip(blocks, pairs, strict=True)]).sum(0)  # [m, m]
    squares, vectors = torch.linalg.eigh(core)
    kept = squares.clamp_min(0).sqrt() > 1e-5
    kept[-1] = True  # so that a layer that changes nothing has a direction, too
    return q @ vectors[:, kept]


def _limits(layers: Layers, share: float) -> list[torch.Tensor]:
    """The smallest size of the entries that each expert keeps, one threshold over all its layers."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of entries that stays must be above 0 and at most 1, got {share}")
    limits = []
    for own in zip(*layers.values(), strict=True):  # of one expert
        pairs = [pair for pair in own if pair is not None]
        sizes, end = torch.empty(sum(p.up.shape[0] * p.down.shape[1] for p in pairs), dtype=torch.float64), 0
        for pair in pairs:
            delta = pair.delta()
            sizes[end : (end := end + delta.numel())] = delta.abs().flatten()
        at = len(sizes) - max(1, round(share * len(sizes)))
        sizes.numpy().partition(at)  # in place, unlike torch's kthvalue
        limits.append(sizes[at].clone())
    return limits


def _trimmed(layer: Layer, limits: Sequence[torch.Tensor]) -> torch.Tensor:
    """delta W of the experts that have a layer, [n, Cout, Cin], without their small entries."""
    deltas = [(p.delta(), limit) for p, limit in zip(layer, limits, strict=True) if p is not None]
    return torch.stack([d * (d.abs() >= limit) for d, limit in deltas])


def _elected(deltas: torch.Tensor) -> torch.Tensor:
    """Steps 2 and 3 of TIES, [n, ...] -> [...]: the sign of the sum, then the mean of the entries with that sign."""
    agree = deltas * deltas.sum(0).sign() > 0
    return (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)
