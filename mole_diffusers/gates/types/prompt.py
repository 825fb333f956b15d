"""MiLoRA (Zhang et al., EMNLP Findings 2024, arXiv 2410.18035): weights from the prompt, computed once per prompt.

The paper's experts are the modules of one adapter. Here they are the concepts, the modules, or each concept in each module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from mole_diffusers import functional
from mole_diffusers.functional import Routed
from mole_diffusers.gates.contract import Context, Gate, GatePlace, GateType
from mole_diffusers.gates.unchanged import LastTensor, version

GELU = (  # coefficients of `rational` fitted to GELU on -3..3; the error is below 0.01 there
    (0.004525, 1.512375, 3.159837, 0.949968, -2.522988, -0.995814, 0.886464),
    (-0.064023, 0.727497, -3.681504, 4.77009, -1.75203),
)


@dataclass(frozen=True)
class Prompt(GateType, name="prompt"):
    """Reads the text once per prompt.

    Attributes:
        axis: share weight among LoRAs ("concept"), the layers of a block ("module"), or "both".
        top: how many of these have weight. 0 is all.
        total: what the weights sum to: 1, N, or none: probabilities as top-k left them.
    """

    reads_prompt = True
    axis: Literal["concept", "module", "both"] = "concept"
    top: Annotated[int, 0, 1 << 16] = 0
    total: Literal["1", "N", "none"] = "N"

    @property
    def weighs_layers_apart(self) -> bool:
        return self.axis != "concept"

    def gate(self, at: GatePlace) -> PromptGate:
        return PromptGate(at.width, at.layer_adapters, axis=self.axis, top=self.top, total=self.total)


def rational(x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """MiLoRA's learned activation: sum_j a_j y^j / (1 + |sum_i b_i y^i|), with j from 0 and i from 1.

    y is x / 3, so that all coefficients have a similar effect on -3..3.
    """
    powers = torch.stack([(x / 3) ** j for j in range(len(numerator))], -1)
    return (powers @ numerator) / (1 + (powers[..., 1 : len(denominator) + 1] @ denominator).abs())


class PromptGate(Gate):
    """softmax(W g(h)), then top-k (MiLoRA, eq. 5-8). h = softmax(H w)^T H pools the prompt's tokens by self-attention.

    Every gate location has its own w, W and g. They begin even: w and W are zero, g is close to GELU. The router runs once
        per
    prompt: it reuses its logits for the very same states, while masks and strengths may change.

    The paper does not say whether the kept probabilities are renormalised. `total` is "none" (as they are), "1" or "N"
    (they sum to the number of experts in the mask). With guidance, every row has the weights of its own prompt. In
    folded weights (`mixture.collapsed(prompt)`), the prompt decides for all rows.

    Args:
        layer_adapters: which experts each layer of the gate location has, [M][N]; one row for the whole gate location on
            axis "concept".
        axis: the softmax is over the N concepts, the M modules, or "both", N * M.
        top: how many of them are kept; 0 keeps all.
    """

    step_invariant = True
    present: torch.Tensor

    def __init__(self, width: int, layer_adapters: Sequence[Sequence[bool]], *, axis: str, top: int, total: str):
        super().__init__()
        self.axis, self.top, self.total = axis, top, total
        self.register_buffer("present", torch.tensor(layer_adapters), persistent=False)  # [M, N]
        modules, concepts = len(layer_adapters), len(layer_adapters[0])
        count = {"concept": concepts, "module": modules, "both": modules * concepts}[axis]
        self.pooler = nn.Parameter(torch.zeros(width))  # w
        self.weight = nn.Parameter(torch.zeros(count, width))  # W
        self.numerator, self.denominator = (nn.Parameter(torch.tensor(c)) for c in GELU)
        self._last = LastTensor(), 0, torch.zeros(0)  # the last text, with the versions and logits for it
        self._routed: list[Routed] | None = None

    def pooled(self, hidden: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        """[B, T, C] -> [B, C] over the tokens that count."""
        scores = hidden @ self.pooler.float()  # [B, T]
        if tokens is not None:
            scores = scores.masked_fill(~tokens, torch.finfo(scores.dtype).min)
        return (torch.softmax(scores, -1)[..., None] * hidden).sum(1)

    def route(self, hidden: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        """Logits [B, E]."""
        features = rational(self.pooled(hidden.float(), tokens), self.numerator.float(), self.denominator.float())
        return features @ self.weight.float().T

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """[B, N]; [B, M, N] on axes other than "concept"."""
        logits = self._once(hidden, context.tokens)
        there = self.present & context.mask[..., None, :]  # [M, N] or [B, M, N]
        if self.axis == "concept":
            return self._shared(logits, context.mask)
        if self.axis == "module":
            return self._shared(logits, there.any(-1))[..., None] * there
        return self._shared(logits, there.flatten(-2)).unflatten(-1, there.shape[-2:])

    def sensitivity(self) -> dict[str, float]:
        return {"pooler": len(self.pooler), "weight": len(self.pooler)}

    @contextmanager
    def noting_routes(self) -> Iterator[list[Routed]]:
        self._routed = routed = list[Routed]()
        try:
            yield routed
        finally:
            self._routed = None

    def _shared(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        probabilities = functional.gate_weights(logits, mask, "1")  # [B, E]
        kept = probabilities * functional.among_largest(probabilities, self.top)
        if self._routed is not None and torch.is_grad_enabled():
            self._routed.append((probabilities, kept, mask))
        if self.total == "none":
            return kept
        share = kept / kept.sum(-1, keepdim=True).clamp_min(1e-12)
        return share * mask.sum(-1, keepdim=True) if self.total == "N" else share

    def _once(self, hidden: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.route(hidden, tokens)
        versions = sum(version(p) for p in self.parameters())
        text, before, logits = self._last
        if not text.is_again(hidden) or before != versions:
            logits = self.route(hidden, tokens)
            self._last = text, versions, logits
        return logits
