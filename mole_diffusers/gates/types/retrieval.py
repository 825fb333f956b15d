"""RAMoLE (Zhao et al., 2024, arXiv 2406.16989): weights from how well each expert's output matches a router LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates.contract import Context, Gate, GatePlace, GateType, Layer


@dataclass(frozen=True)
class Retrieval(GateType, name="retrieval"):
    """Compares the LoRAs' outputs at every layer, and serves LoRAs that it never saw.

    Attributes:
        rank: rank of the gate's router, 1 to 128.
        scores: each "token" has its own weights, or the "image" has one set.
        total: what the weights sum to: 1 as in the paper, or N.
    """

    one_gate_per = "matrix"
    reads_ranks = True
    of_experts = False
    rank: Annotated[int, 1, 128] = 4
    scores: Literal["token", "image"] = "token"
    total: Literal["1", "N"] = "N"

    def gate(self, at: GatePlace) -> RetrievalGate:
        return RetrievalGate(at.width, at.one_layer.out, rank=self.rank, total=self.total, scores=self.scores)


def answers(query: torch.Tensor, layer: Layer, router_up: torch.Tensor, experts: int) -> torch.Tensor:
    """<v_i, B' A' x> for every expert's output v_i = B_i A_i x, [B, T, N], without computing any v_i.

    It equals <A' x, (B'^T B_i) A_i x>, where B'^T B_i is only r x r_i.

    Args:
        query: A' x, [B, T, r].
        router_up: B', [Cout, r].
    """
    between = router_up.T @ layer.up.flatten(1).float()  # [r, R]
    by_rank = (query @ between) * functional.as_tokens(layer.low).float()  # [B, T, R]
    return by_rank.new_zeros(*by_rank.shape[:-1], experts).index_add(-1, layer.expert_index, by_rank)


class RetrievalGate(Gate):
    """softmax_i(<v_i, B' A' x> / sqrt(r)) over the experts that are present (RAMoLE, eq. 8-10), at every layer.

    Only the router LoRA (A', B') is learned. Nothing belongs to a single expert, so gates trained with some LoRAs serve
    any others. B' begins at zero, which gives all experts equal weight. Experts are scored with their own alpha / r,
    without strengths.

    Args:
        total: "1" (the paper), or "N", so that equal scores give the plain sum. An average dilutes identity in pictures.
        scores: each "token" has its own weights (the paper), or scores are averaged over the "image" first.
    """

    def __init__(self, width: int, out: int, *, rank: int, total: str, scores: str):
        super().__init__()
        self.total, self.scores = total, scores
        generator = torch.Generator().manual_seed(0)  # attaching must not use the global generator
        self.down = nn.Parameter((torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5)  # A'
        self.up = nn.Parameter(torch.zeros(out, rank))  # B'

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        if context.layer is None:
            raise ValueError("a retrieval gate sits at one layer and needs its experts")
        query = hidden.float() @ self.down.float().T  # [B, T, r]
        scores = answers(query, context.layer, self.up.float(), context.mask.shape[-1]) / len(self.down) ** 0.5
        return functional.gate_weights(
            scores.mean(1) if self.scores == "image" else scores, context.mask_or_none, self.total
        )

    def sensitivity(self) -> dict[str, float]:
        return {"down": self.down.shape[-1], "up": self.up.shape[0]}
