"""The contract of every gate family: what a gate is told, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass
class Layer:
    """The experts of the one layer that a gate weighs.

    Attributes:
        project: gives A x; asked only where somebody reads `low`.
        up: [Cout, R] or [Cout, R, 1, 1].
        segment: [R] -> index of the expert each rank belongs to.
    """

    project: Callable[[], torch.Tensor]
    up: torch.Tensor
    segment: torch.Tensor
    _low: torch.Tensor | None = None

    @property
    def low(self) -> torch.Tensor:
        """A x: [B, R], [B, T, R] or [B, R, H, W]."""
        if self._low is None:
            self._low = self.project()
        return self._low


@dataclass(frozen=True)
class Context:
    """What a gate is told beside the state it reads.

    Attributes:
        mask: [N] bool, the experts that are present and active; [B, N] where each row of the batch has a set of its own.
        time: [B] in 0..1, the noise level (1 is pure noise).
        layer: the layer's own experts, where the gate sits at one layer.
        tokens: [B, T] bool, the tokens of a text that count; None where all do.
    """

    mask: torch.Tensor
    time: torch.Tensor
    layer: Layer | None = None
    tokens: torch.Tensor | None = None


class Gate(Protocol):
    """`gate(hidden, context)` -> weights [N], [B, N] or [B, T, N], fp32, zero outside `context.mask`.

    hidden [B, T, C] is what the gate's place hands it, in the host's precision. `total` is what the weights sum to;
    `fusible` is true when they depend on nothing that changes while sampling, `blind` when on no state at all, `steady` when
    on nothing but state and mask, so that a text's weights stand from step to step; `ranked` when they are per rank of the
    layer instead, [B, T, R].
    """

    total: str
    fusible: bool
    blind: bool
    steady: bool
    ranked: bool

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def buffers(self) -> Iterator[torch.Tensor]: ...

    def __call__(self, hidden: torch.Tensor, context: Context) -> torch.Tensor: ...
