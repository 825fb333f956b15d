"""Families without parameters: the plain sum, and the mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mole_diffusers import functional
from mole_diffusers.gates.contract import Context, Gate, GatePlace, GateType


@dataclass(frozen=True)
class Sum(GateType, name="sum"):
    """Every LoRA at weight 1."""

    learns = False

    def gate(self, at: GatePlace) -> ConstantGate:
        return ConstantGate("N")


@dataclass(frozen=True)
class Mean(GateType, name="mean"):
    """Every LoRA at weight 1 / N."""

    learns = False

    def gate(self, at: GatePlace) -> ConstantGate:
        return ConstantGate("1")


class ConstantGate(Gate):
    """`sum` (total "N": weight 1 each) and `mean` (total "1": NLA, eq. 2 of MoLE with equal weights)."""

    step_invariant = input_free = True

    def __init__(self, total: str):
        super().__init__()
        self.total = total

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        return functional.gate_weights(
            torch.zeros(context.mask.shape, device=hidden.device), context.mask_or_none, self.total
        )
