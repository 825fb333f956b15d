"""MoLE by its equations (Wu et al., ICLR 2024, eq. 5-13): blocks run once with each LoRA, and their outputs are weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from mole_diffusers.gates.contract import GatePlace, GateType
from mole_diffusers.gates.types.mole import MoLEGate

LENGTH = 0.01  # of each row of e before training, as in the authors' code: logits are at most this far from 0


@dataclass(frozen=True)
class Outputs(GateType, name="outputs"):
    """Runs each block once with each LoRA, and weighs what they add to its output (MoLE by its equations).

    Attributes:
        features: tokens are "pooled" (any resolution) or "flattened" (the paper; one resolution).
        area: for flattened features: the pictures' area, in areas of the model's own size.
    """

    untrained = "about the mean"
    mixes_outputs = True
    features: Literal["pooled", "flattened"] = "pooled"
    area: Annotated[float, 0.01, 100] = 1.0

    @property
    def picture_area(self) -> float:
        return self.area

    def gate(self, at: GatePlace) -> OutputGate:
        if at.is_network or self.features == "pooled":  # outside of blocks it reads text and time, as a single token
            return OutputGate(at.experts, at.width, "pooled")
        if not at.tokens:
            raise ValueError("flattened features need a model with a size of its own, and this one is for any")
        return OutputGate(at.experts, at.width * at.tokens, "flattened")


class OutputGate(MoLEGate):
    """Eq. 9-11 of MoLE: G = softmax(e . [E_1 .. E_N] / (|[E_1 .. E_N]| tau)), whose weights sum to 1.

    E_i(x) is what expert i alone adds to the output of its block for the input x: F_i(x) - F(x). The block's output is
    then F(x) + sum_i G_i E_i(x).
    """

    starts_anywhere = False

    def __init__(self, experts: int, width: int, features: str):
        super().__init__(experts, width, "1", features)
        generator = torch.Generator().manual_seed(0)  # attaching must not use the global generator
        with torch.no_grad():
            self.matrix.copy_(LENGTH * F.normalize(torch.randn(experts, width, generator=generator), dim=-1))
