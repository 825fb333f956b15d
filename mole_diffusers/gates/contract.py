"""The interface of all gate families: what a gate gets, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass
class Layer:
    """The experts of the layer that a gate sits at.

    Attributes:
        low: A x: [B, R], [B, T, R] or [B, R, H, W].
        up: [Cout, R] or [Cout, R, 1, 1].
        segment: [R] -> index of the expert that each rank belongs to.
    """

    low: torch.Tensor
    up: torch.Tensor
    segment: torch.Tensor


@dataclass(slots=True)
class Context:
    """What a gate gets besides the state it reads.

    Attributes:
        mask: [N] bool, the experts that are present and active; [B, N] if each row of the batch has its own set.
        time: [B] in 0..1, the noise level (1 is pure noise).
        layer: the layer's experts, if the gate sits at one layer.
        tokens: [B, T] bool, the tokens of a text that count; None if all do.
        all_active: whether `mask` is true for all experts, known without asking the device.
    """

    mask: torch.Tensor
    time: torch.Tensor
    layer: Layer | None = None
    tokens: torch.Tensor | None = None
    all_active: bool = False

    @property
    def mask_or_none(self) -> torch.Tensor | None:
        """`mask`, or None if it is true for all experts, which saves operations."""
        return None if self.all_active else self.mask


class Gate(Protocol):
    """`gate(hidden, context)` -> weights [N], [B, N] or [B, T, N], fp32, zero outside `context.mask`.

    A gate is an `nn.Module`. It never waits for the device (no `.item()`, no `if tensor`). The user's strengths are
    applied after it.

    hidden [B, T, C], of any dtype, is what enters the gate's place:

    - one gate per "block": the input of the block's first attention, after the norm;
    - per "layer": the input of that attention or feed-forward;
    - per "matrix", "retrieval", "rank" and "factors": the input of the linear or convolution layer;
    - "flow": the input of the block, or its text; outside of blocks that of each layer;
    - "prompt": the denoiser's text; in a text encoder the input of the block, or outside of blocks of the first;
    - for layers outside of blocks otherwise, and per "model": [B, 1, C + 32], the mean text and the noise level; in a
      text encoder the input of the first block.

    For `inputs="experts"` it is the experts' outputs for that input, [B, T, D], except in the last case.

    Attributes:
        step_invariant: the weights depend on nothing that changes while sampling, so they can be folded.
        input_free: the weights depend on parameters and `context.mask` alone.
        ranked: the weights are per rank of the layer instead of per expert: [R], [B, R] or [B, T, R].
    """

    step_invariant: bool
    input_free: bool
    ranked: bool

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def __call__(self, hidden: torch.Tensor, context: Context) -> torch.Tensor: ...
