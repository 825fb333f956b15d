"""Merges that are linear in the experts: sum, mean, and NP-LoRA's projection."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mole_diffusers.merging.factors import Layer, Layers, Merged, Pair, concatenated, present


def total(layers: Layers) -> Merged:
    """sum_k delta W_k, like `set_adapters` with weights 1."""
    return {key: concatenated(present(layer)) for key, layer in layers.items()}


def mean(layers: Layers) -> Merged:
    """Normalised linear arithmetic, eq. 2 of MoLE: every expert at 1 / N, even in layers that some experts lack."""
    return {key: concatenated([p._replace(up=p.up / len(layer)) for p in present(layer)]) for key, layer in layers.items()}


def null_space(layers: Layers, *, protect: Sequence[int] = (-1,), mu: float = 0.5) -> Merged:
    """NP-LoRA (arXiv 2511.11051): the other experts' inputs lose mu / (1 + mu) of their part along the protected
    experts' inputs.

    The paper prints its soft operator on the output side of delta W. Its hard form and appendix work on the input side,
    where the protected directions are, and so does this function.

    Args:
        protect: indices of the experts that stay unchanged, such as a style; by default the last.
        mu: 0 is the sum; infinity removes the shared directions completely.
    """
    if mu < 0:
        raise ValueError(f"mu of NP-LoRA must be 0 or more, got {mu}")
    share = 1.0 if math.isinf(mu) else mu / (1 + mu)
    return {key: _projected(layer, protect, share) for key, layer in layers.items()}


def _projected(layer: Layer, protect: Sequence[int], share: float) -> Pair:
    kept = {index % len(layer) for index in protect}
    style = [p.folded() for i, p in enumerate(layer) if p is not None and i in kept]
    content = [p.folded() for i, p in enumerate(layer) if p is not None and i not in kept]
    if not style or not content:
        return concatenated(style + content)
    q = directions(style)  # [Cin, Q]
    return concatenated(style + [p._replace(down=p.down - share * (p.down @ q) @ q.T) for p in content])


def directions(pairs: Sequence[Pair]) -> torch.Tensor:
    """An orthonormal basis [Cin, Q] of the inputs that any pair responds to, by more than 1e-6 of the strongest response."""
    rows = torch.cat([torch.linalg.qr(p.up).R @ p.down for p in pairs])  # as long as the responses: |rows x| = |delta x|
    _, values, v = torch.linalg.svd(rows, full_matrices=False)
    return v[values > 1e-6 * values[0]].T
