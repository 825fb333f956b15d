"""LoRA-LEGO (arXiv 2409.16167): ranks of all experts as bricks, clustered, one rank per cluster."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from mole_diffusers.merging.factors import Layer, Layers, Merged, Pair

ROUNDS = 100  # of Lloyd's algorithm; it stops when nothing moves


def lego(
    layers: Layers,
    *,
    clusters: int | None = None,
    features: Literal["raw", "normalized"] = "raw",
    canonical: bool = False,
    seed: int = 0,
    starts: int = 10,
) -> Merged:
    """LoRA-LEGO: clusters units by k-means; each cluster's mean becomes one rank of the result.

    A unit is a row of down with its column of up. A mean is scaled back to the size of its cluster's members. Units of
    independent experts are nearly orthogonal, so with fewer clusters than ranks a cluster's mean is close to none of
    them. Expect to lose concepts.

    Args:
        clusters: ranks of the result, at most as many as units; by default the largest rank among the experts.
        features: cluster the units as they are ("raw") or with both halves at length 1 ("normalized").
        canonical: first bring each unit to equal halves and one sign, since (a, b), (2a, b / 2) and (-a, -b) are the
            same rank. The paper does not.
        seed: of the first centres.
        starts: how often k-means starts; the tightest clustering is taken.
    """
    if clusters is not None and clusters < 1:
        raise ValueError(f"clusters must be 1 or more, got {clusters}")
    if starts < 1:
        raise ValueError(f"starts of k-means must be 1 or more, got {starts}")
    out: Merged = {}
    for key, layer in layers.items():
        ranks = [p.rank for p in layer if p is not None]
        units, width = _units(layer, canonical)
        count = min(clusters or max(ranks), len(units))
        if features == "normalized":
            points = torch.cat([F.normalize(half, dim=1, eps=1e-30) for half in (units[:, :width], units[:, width:])], 1)
        else:
            points = units
        labels = kmeans(points, count, seed=seed, starts=starts)
        out[key] = assembled(units, labels, width, rank=sum(ranks) / len(ranks))
    return out


def _units(layer: Layer, canonical: bool) -> tuple[torch.Tensor, int]:
    """[R, Cin + Cout] rows [a; b], with the root of the scale in each half, and Cin. Sorted, so that order does not
    matter.
    """
    pairs = [p for p in layer if p is not None]
    rows = []
    for pair in pairs:
        root, sign = abs(pair.scale) ** 0.5, -1.0 if pair.scale < 0 else 1.0
        a, b = pair.down * root, pair.up.T * root * sign
        rows.append(torch.cat(_canonical(a, b) if canonical else (a, b), 1))
    units = torch.cat(rows)
    return units[sorted(range(len(units)), key=lambda i: units[i].tolist())], pairs[0].down.shape[1]


def _canonical(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    long_a, long_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    sign = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    balance = sign * (long_b / long_a.clamp_min(1e-30)).sqrt()
    return a * balance, b / torch.where(balance == 0, 1, balance)


def assembled(units: torch.Tensor, labels: torch.Tensor, width: int, *, rank: float) -> Pair:
    """Clusters -> one pair: means, reweighted to their members' mean largest entry, times sqrt(rank / k) in total.

    `rank` is the experts' own rank. If the experts differ, it is their mean, which the paper leaves open.
    """
    means = []
    for label in labels.unique():
        members = units[labels == label]
        centre = members.mean(0)
        means.append(centre * members.abs().amax(1).mean() / centre.abs().amax().clamp_min(1e-30))
    merged = torch.stack(means) * (rank / len(means)) ** 0.25  # [k, Cin + Cout]; both halves take a root
    return Pair(merged[:, :width], merged[:, width:].T)


def kmeans(points: torch.Tensor, count: int, *, seed: int, starts: int) -> torch.Tensor:
    """Labels [P] of the tightest of several runs of Lloyd's algorithm from k-means++ centres."""
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(points, _spread(points, count, generator)) for _ in range(starts)]
    return min(runs, key=lambda run: run[1])[0]


def _spread(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next centre is drawn by its squared distance to those chosen."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < count:
        far = _squares(points, points[chosen]).amin(1)
        far[chosen] = 0
        free = torch.ones(len(points), dtype=far.dtype).index_fill(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(far if far.sum() > 0 else free, 1, generator=generator)))
    return points[chosen]


def _lloyd(points: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, float]:
    labels = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        squares = _squares(points, centres)  # [P, k]
        nearest = squares.argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        members = F.one_hot(labels, len(centres)).to(points)  # [P, k]
        counts = members.sum(0)[:, None]
        centres = torch.where(counts > 0, members.T @ points / counts.clamp_min(1), centres)
    return labels, _squares(points, centres).gather(1, labels[:, None]).sum().item()


def _squares(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
