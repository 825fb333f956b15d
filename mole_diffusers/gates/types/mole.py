"""MoLE (Wu et al., ICLR 2024): weights from the whole state at a gate location."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates.contract import Context, Gate, GatePlace, GateType
from mole_diffusers.gates.unchanged import Derived

SHORT = 1e-6  # features of a block are longer by far; shorter ones stay as they are, so that zeros give equal weights


@dataclass(frozen=True)
class MoLE(GateType, name="mole"):
    """Reads the block's state as a whole.

    Attributes:
        granularity: one gate per "model", "block", "layer" (attention or feed-forward) or "matrix".
        total: weights sum to "1" (the paper), or to their number "N"; or they do not, each a "sigmoid" or "linear".
        inputs: read the "hidden" state (the authors' code) or the outputs of the "experts" (the paper).
        features: tokens are "pooled" (any resolution) or "flattened" (the paper; one resolution).
        bias: add a learned number per LoRA, which the paper does not have. Needed to start at unequal weights.
    """

    granularity: Literal["model", "block", "layer", "matrix"] = "block"
    total: Literal["1", "N", "sigmoid", "linear"] = "N"
    inputs: Literal["hidden", "experts"] = "hidden"
    features: Literal["pooled", "flattened"] = "pooled"
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "model" and (self.inputs, self.features) != ("hidden", "pooled"):
            raise ValueError("a gate for the whole model reads text and time: inputs 'hidden' and features 'pooled' only")

    @property
    def one_gate_per(self) -> str:
        return self.granularity

    @property
    def reads_experts(self) -> bool:
        return self.inputs == "experts"

    @property
    def reads_tokens(self) -> bool:
        return self.features == "flattened"

    def gate(self, at: GatePlace) -> MoLEGate:
        if at.is_network or not self.reads_tokens:  # outside of blocks it reads text and time, as a single token
            return MoLEGate(at.experts, at.width, self.total, "pooled", bias=self.bias)
        if not at.tokens:
            raise ValueError("flattened features need a fixed number of tokens: use granularity 'block' or 'layer'")
        return MoLEGate(at.experts, at.width * at.tokens, self.total, "flattened", bias=self.bias)


class MoLEGate(Gate):
    """Eq. 9-11 of MoLE: softmax(e . normalised features / tau). tau is learned, and kept positive as exp(log_tau).

    The paper leaves the normalisation open; as in the authors' code, it is L2 over the whole vector. `renorm` does it in one
    operation: it shortens features to the length SHORT, and e is divided by SHORT and tau, once until it changes.

    Starts at equal weights (zero matrix). The linear map has no bias, as in the authors' code. `bias` adds a learned
    number per expert, so that the gate can start at any weights.
    """

    starts_anywhere = True
    bias: nn.Parameter | None

    def __init__(self, experts: int, width: int, total: str, features: str, *, bias: bool = False):
        super().__init__()
        self.total, self.width = total, width
        self.features = functional.flattened if features == "flattened" else functional.pooled
        self.matrix = nn.Parameter(torch.zeros(experts, width))  # e, [N, D]
        self.log_tau = nn.Parameter(torch.zeros(()))
        self._sharpened = Derived()
        self.register_parameter("bias", nn.Parameter(torch.zeros(experts)) if bias else None)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        features = self.features(hidden).float()  # [B, D]
        if features.shape[-1] != self.width:
            raise ValueError(
                f"a gate with flattened features was built for {self.width} values and got {tuple(hidden.shape[1:])} "
                f"(tokens x channels): it is tied to one resolution; use features='pooled' for any other"
            )
        features = torch.renorm(features, 2, 0, SHORT)
        logits = features @ self._sharpened.get(self._over_tau, self.matrix, self.log_tau)  # [B, N]
        if self.bias is not None:
            logits = logits + self.bias.float()
        return functional.gate_weights(logits, context.mask_or_none, self.total)

    def _over_tau(self) -> torch.Tensor:
        """e / (tau SHORT), [D, N]."""
        return (self.matrix.float() / (self.log_tau.float().exp() * SHORT)).T

    def sensitivity(self) -> dict[str, float]:
        return {"matrix": self.width**0.5}  # features have length 1

    @torch.no_grad()
    def begin(self, weights: torch.Tensor, mask: torch.Tensor) -> None:
        """Start at `weights` [N] for the experts in `mask` [N], as near as `total` allows.

        Raises ValueError for a gate without a bias.
        """
        if self.bias is None:
            raise ValueError("a mole gate needs a bias to start at other weights than equal ones: set the gate's bias")
        self.bias.copy_(functional.logits_for(weights, self.total))
