"""The pairs of factors that merges work on. N experts, R the sum of their ranks. Convolutions are flattened to matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


class Pair(NamedTuple):
    """The low-rank change of one layer by one expert, or by a merge: delta W = scale * up @ down."""

    down: torch.Tensor  # [r, Cin]
    up: torch.Tensor  # [Cout, r]
    scale: float = 1.0  # alpha / r times the user's weight

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def folded(self) -> Pair:
        """The same change of the weight with its scale inside `up`."""
        return Pair(self.down, self.up * self.scale)

    def delta(self) -> torch.Tensor:
        """[Cout, Cin]"""
        return self.scale * self.up @ self.down

    def energy(self) -> float:
        """The squared Frobenius norm |delta W|^2, from the r x r Gram matrices."""
        return self.scale**2 * ((self.up.T @ self.up) * (self.down @ self.down.T)).sum().item()


Layer = Sequence[Pair | None]  # one entry per expert, None if it lacks the layer
Layers = Mapping[str, Layer]
Merged = dict[str, Pair]


def present(layer: Layer) -> list[Pair]:
    """The pairs of the experts that have the layer, scales folded in."""
    return [pair.folded() for pair in layer if pair is not None]


def concatenated(pairs: Sequence[Pair]) -> Pair:
    """Pairs side by side, so that up @ down is the sum of all. down [R, Cin], up [Cout, R]."""
    return Pair(torch.cat([p.down for p in pairs]), torch.cat([p.up * p.scale for p in pairs], 1))


def dense(delta: torch.Tensor) -> Pair:
    """A full matrix [Cout, Cin] as a pair; its rank is that of the smaller side."""
    rows, columns = delta.shape
    if rows <= columns:
        return Pair(delta, torch.eye(rows, dtype=delta.dtype))
    return Pair(torch.eye(columns, dtype=delta.dtype), delta)
