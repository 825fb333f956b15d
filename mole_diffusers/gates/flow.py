"""LoRA-Flow (Wang et al., ACL 2024): weights token by token."""

from __future__ import annotations

import torch
from torch import nn

from mole_diffusers import mixing
from mole_diffusers.gates.contract import Context


class FlowGate(nn.Module):
    """w_t = softmax(W x_t) + b, the bias after the softmax, for every token of the block's input x (LoRA-Flow, eq. 4-5).

    Weights are free in sign and size; they sum to 1 + sum b. b is the start less 1/n plus a learned part that begins at
    zero, with n experts in the mask, so that an absent expert leaves the others where they would start without it. W
    begins at zero.

    Args:
        start: the weights before training: "sum" 1 each, "mean" 1/n each, "faithful" (the paper) the last expert alone.
    """

    total, fusible, blind, ranked = "free", False, False, False

    def __init__(self, experts: int, width: int, start: str):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.zeros(experts, width))  # W
        self.offset = nn.Parameter(torch.zeros(experts))

    def bias(self, mask: torch.Tensor) -> torch.Tensor:
        """b as the paper has it, [N] (or as `mask`)."""
        share = 1 / mask.sum(-1, keepdim=True).clamp_min(1)
        last = torch.arange(mask.shape[-1], device=mask.device) == mask.shape[-1] - 1
        start = {"sum": torch.ones_like(share), "mean": share, "faithful": last.float()}[self.start]
        return start - share + self.offset.float()

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        shares = mixing.gate_weights(hidden.float() @ self.weight.float().T, context.mask, "1")  # [B, T, N]
        return (shares + mixing.over_tokens(self.bias(context.mask), shares)) * mixing.over_tokens(context.mask, shares)
