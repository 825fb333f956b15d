"""MoLE (Wu et al., ICLR 2024): weights from the whole state of a place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates.contract import Context


class MoLEGate(nn.Module):
    """Eq. 9-11 of MoLE: softmax(e . normalised features / tau). tau is learned, and kept positive as exp(log_tau).

    Starts at equal weights (zero matrix). The linear map has no bias, as in the authors' code. `bias` adds a learned
    number per expert, so that the gate can start at any weights.
    """

    step_invariant, input_free, ranked = False, False, False
    bias: nn.Parameter | None

    def __init__(self, experts: int, width: int, total: str, features: str, *, bias: bool = False):
        super().__init__()
        self.total, self.width = total, width
        self.features = functional.flattened if features == "flattened" else functional.pooled
        self.matrix = nn.Parameter(torch.zeros(experts, width))  # e, [N, D]
        self.log_tau = nn.Parameter(torch.zeros(()))
        self.register_parameter("bias", nn.Parameter(torch.zeros(experts)) if bias else None)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        features = functional.l2_normalized(self.features(hidden).float())  # [B, D]
        if features.shape[-1] != self.width:
            raise ValueError(
                f"a gate with flattened features was built for {self.width} values and got {tuple(hidden.shape[1:])} "
                f"(tokens x channels): it is tied to one resolution; use features='pooled' for any other"
            )
        logits = F.linear(features, self.matrix.float()) / self.log_tau.float().exp()  # [B, N]
        if self.bias is not None:
            logits = logits + self.bias.float()
        return functional.gate_weights(logits, context.mask_or_none, self.total)

    @torch.no_grad()
    def begin(self, weights: torch.Tensor, mask: torch.Tensor) -> None:
        """Start at `weights` [N] for the experts in `mask` [N], as near as `total` allows.

        Raises ValueError for a gate without a bias.
        """
        if self.bias is None:
            raise ValueError("a mole gate needs a bias to start at other weights than equal ones: set the gate's bias")
        self.bias.copy_(functional.logits_for(weights, self.total))
