"""LoRA-Flow (Wang et al., ACL 2024): weights token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates.contract import Context, Gate, GatePlace, GateType
from mole_diffusers.gates.unchanged import Derived


@dataclass(frozen=True)
class Flow(GateType, name="flow"):
    """Reads the block's state token by token.

    Attributes:
        start: weights before training: the plain "sum", the "mean", or "faithful" to the paper (the last LoRA alone).
    """

    one_gate_per = "token type"
    start: Literal["sum", "mean", "faithful"] = "sum"

    def gate(self, at: GatePlace) -> FlowGate:
        return FlowGate(at.experts, at.width, self.start)


class FlowGate(Gate):
    """w_t = softmax(W x_t) + b for every token of the block's input x, the bias after the softmax (LoRA-Flow, eq. 4-5).

    Weights are free in sign and size, and sum to 1 + sum b. W begins at zero. b = start - 1/n + a learned part that
    begins at zero, with n experts in the mask. So an absent expert leaves the others at the weights that they would
    start with without it.

    Args:
        start: the weights before training: "sum" 1 each, "mean" 1/n each, "faithful" (the paper) the last expert
            in the mask alone.
    """

    starts_anywhere = True

    def __init__(self, experts: int, width: int, start: str):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.zeros(experts, width))  # W
        self.offset = nn.Parameter(torch.zeros(experts))
        self._columns, self._all_there = Derived(), Derived()

    def bias(self, mask: torch.Tensor) -> torch.Tensor:
        """b of the paper, [N] (or shaped like `mask`)."""
        return self._start(mask) - _equal_share(mask) + self.offset.float()

    def _start(self, mask: torch.Tensor) -> torch.Tensor:
        if self.start == "faithful":
            return (mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)).float()  # in the mask, with none after it
        return _equal_share(mask) if self.start == "mean" else torch.ones_like(_equal_share(mask))

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        # The states of a UNet's blocks are stored channel by channel; hidden @ W^T, or any matmul, would copy them first.
        rows = len(hidden)
        columns = self._columns.get(lambda: self.weight.float().T.expand(rows, -1, -1), self.weight, rows=rows)  # [B, C, N]
        shares = functional.gate_weights(torch.bmm(hidden.float(), columns), context.mask_or_none, "1")  # [B, T, N]
        if context.all_weighed and self.start == "sum":  # the same in one operation
            return shares + self._all_there.get(lambda: self.offset.float() + (1 - 1 / shares.shape[-1]), self.offset)
        mask = functional.over_tokens(context.mask, shares)
        return (shares + functional.over_tokens(self.bias(context.mask), shares)) * mask

    def sensitivity(self) -> dict[str, float]:
        return {"weight": self.weight.shape[-1]}

    @torch.no_grad()
    def begin(self, weights: torch.Tensor, mask: torch.Tensor) -> None:
        """Start at `weights` [N] at every token, if the experts in `mask` [N] are present."""
        self.offset.copy_(weights - self._start(mask))


def _equal_share(mask: torch.Tensor) -> torch.Tensor:
    """1 / n, [1] (or [B, 1]), for the n experts in `mask`."""
    return 1 / mask.sum(-1, keepdim=True).clamp_min(1)
