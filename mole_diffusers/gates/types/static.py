"""Learned weights that are constant, or change with the noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates.contract import Context, Gate, GatePlace, GateType


@dataclass(frozen=True)
class Static(GateType, name="static"):
    """Learns weights that are constant or change with time.

    Attributes:
        granularity: one gate per "model", "block", "layer" (attention or feed-forward) or "matrix".
        total: weights sum to "1", or to their number "N"; or they do not, each a "sigmoid" or "linear".
        bins: number of sets of weights over the noise levels, 1 to 1000.
    """

    granularity: Literal["model", "block", "layer", "matrix"] = "block"
    total: Literal["1", "N", "sigmoid", "linear"] = "N"
    bins: Annotated[int, 1, 1000] = 1

    @property
    def one_gate_per(self) -> str:
        return self.granularity

    def gate(self, at: GatePlace) -> StaticGate:
        return StaticGate(at.experts, self.total, self.bins)


class StaticGate(Gate):
    """Learned weights per gate location, one set per time bin: [bins, N] logits that start equal."""

    starts_anywhere = True

    def __init__(self, experts: int, total: str, bins: int):
        super().__init__()
        self.total, self.step_invariant, self.input_free = total, bins == 1, bins == 1
        self.logits = nn.Parameter(torch.zeros(bins, experts))

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        bins = len(self.logits)
        index = (context.time * bins).long().clamp(0, bins - 1)  # [B]
        return functional.gate_weights(self.logits.float()[index], context.mask_or_none, self.total)  # [B, N]

    @torch.no_grad()
    def begin(self, weights: torch.Tensor, mask: torch.Tensor) -> None:
        """Start at `weights` [N] for the experts in `mask` [N] at every noise level, as near as `total` allows."""
        self.logits.copy_(functional.logits_for(weights, self.total).expand_as(self.logits))
