"""A learned constant for each rank of each LoRA at every layer. This gate type is not from a paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mole_diffusers.gates.contract import Context, Gate, GatePlace, GateType


@dataclass(frozen=True)
class Factors(GateType, name="factors"):
    """Learns a constant for each rank of each LoRA at every layer."""

    one_gate_per = "matrix"
    reads_ranks = True
    recommended = True  # the best on an earlier base, see docs/appendix.md

    def gate(self, at: GatePlace) -> FactorGate:
        return FactorGate(at.one_layer.ranks)


class FactorGate(Gate):
    """A learned factor for each rank of each expert in one layer: y = W x + B (g * (A x)). g is constant and starts at 1."""

    step_invariant = input_free = ranked = True

    def __init__(self, ranks: Sequence[int]):
        super().__init__()
        self.change = nn.Parameter(torch.zeros(sum(ranks)))  # g - 1, [R]

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        if context.layer is None:
            raise ValueError("a factor gate sits at one layer and needs its experts")
        return (1 + self.change.float()) * context.mask[..., context.layer.expert_index]  # [R] or [B, R]
