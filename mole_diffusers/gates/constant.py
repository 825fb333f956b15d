"""Gates that read nothing, or only the noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates.contract import Context


class ConstantGate(nn.Module):
    """`sum` (total "N": weight 1 each) and `mean` (total "1": NLA, eq. 2 of MoLE with equal weights)."""

    step_invariant, input_free, ranked = True, True, False

    def __init__(self, total: str):
        super().__init__()
        self.total = total

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        return functional.gate_weights(
            torch.zeros(context.mask.shape, device=hidden.device), context.mask_or_none, self.total
        )


class StaticGate(nn.Module):
    """Learned weights per place, one set per time bin: [bins, N] logits that start equal."""

    ranked = False

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


class FactorGate(nn.Module):
    """A learned factor for each rank of each expert in one layer: y = W x + B (g * (A x)). g is constant and starts at 1.

    This gate is not from a paper.
    """

    step_invariant, input_free, ranked = True, True, True

    def __init__(self, ranks: Sequence[int]):
        super().__init__()
        self.change = nn.Parameter(torch.zeros(sum(ranks)))  # g - 1, [R]

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        if context.layer is None:
            raise ValueError("a factor gate sits at one layer and needs its experts")
        return (1 + self.change.float()) * context.mask[..., context.layer.segment]  # [R] or [B, R]
