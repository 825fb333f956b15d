"""SMoRA (Zhao et al., 2025, arXiv 2501.15103): every rank of every LoRA is an expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates.contract import Context, Gate, GatePlace, GateType
from mole_diffusers.lora import LoraWeights
from mole_diffusers.lora.stacking import Stack

LEAST = 1e-12  # the smallest score


@dataclass(frozen=True)
class Rank(GateType, name="rank"):
    """Weighs each rank of each LoRA at every layer by what it reads there.

    Attributes:
        top: how many ranks of a layer have weight. 0 is all.
        partition: this many ranks of a LoRA share one output of the router; 0 is all ranks of the LoRA.
        refactor: turn each LoRA's ranks to its singular directions first, which changes nothing else.
        rate: how far an update moves the bias that evens out the load, 0 to 1.
    """

    one_gate_per = "matrix"
    reads_ranks = True
    top: Annotated[int, 0, 1 << 16] = 0
    partition: Annotated[int, 0, 1 << 16] = 1
    refactor: bool = True
    rate: Annotated[float, 0, 1] = 1e-5

    def gate(self, at: GatePlace) -> RankGate:
        return RankGate(at.width, at.one_layer.ranks, top=self.top, partition=self.partition, rate=self.rate)

    def prepared(self, stack: Stack) -> Stack:
        return singular(stack) if self.refactor else stack


def shared_out(scores: torch.Tensor, mask: torch.Tensor, top: int) -> torch.Tensor:
    """SMoRA's gates: the `top` largest scores [..., R] in `mask`, scaled to mean 1 among themselves.

    If `top` is 0 or above their number, all are kept. `mask` broadcasts over `scores`. Scores below 0, where the load's
    bias outweighs the sigmoid, count as next to 0, so no gate is negative or larger than the number of those kept.
    """
    chosen = functional.among_largest(scores.masked_fill(~mask, -torch.inf), top) & mask
    kept = scores.clamp_min(LEAST) * chosen
    return kept * chosen.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(LEAST)


def singular(stack: Stack) -> Stack:
    """Turn each expert's ranks to its singular directions, the largest first. Its delta W stays the same.

    The ranks of a trained LoRA are arbitrary, B A = (B Q)(Q^-1 A), so gates for single ranks would be arbitrary, too.
    """
    rows: list[LoraWeights | None] = []
    for down, up in zip(stack.down.split(list(stack.ranks)), stack.up.split(list(stack.ranks), 1), strict=True):
        rows.append(LoraWeights(*functional.low_rank(down, up)[:2], 1.0) if len(down) else None)
    return replace(stack, rows=tuple(rows))


def grouped(ranks: Sequence[int], partition: int) -> torch.Tensor:
    """[R] -> the router's output for each rank: `partition` ranks of an expert share one output; 0: all its ranks do."""
    groups: list[int] = []
    for rank in ranks:
        first = groups[-1] + 1 if groups else 0
        groups += [first + j // (partition or rank) for j in range(rank)]
    return torch.tensor(groups)


class RankGate(Gate):
    """z = sigmoid(W x) + c per token and rank; the k largest z are scaled to mean 1, the others are 0 (SMoRA, eq. 6-9).

    W begins at zero, which gives all ranks weight 1 if k takes them all. c evens out the load without a loss: after each
    update of training, `rebalance` raises c by `rate` for a rank that was chosen less often than the mean since the last
    update, and lowers it for one that was chosen more often. As in the authors' code, c also enters the gate's value, but
    here its mean stays 0.

    The LoRAs keep their own alpha / r. (The paper trains its ranks from scratch, with alpha / k.) With k below R, less
    is added in total, which strengths can make up for.

    Args:
        ranks: [N], of each expert in this layer.
        top: k; 0 keeps all.
        partition: this many ranks of an expert share one output of the router; 0: all its ranks, so that whole experts
            compete.
    """

    ranked = True
    group: torch.Tensor
    balance: torch.Tensor

    def __init__(self, width: int, ranks: Sequence[int], *, top: int, partition: int, rate: float):
        super().__init__()
        self.top, self.rate = top, rate
        group = grouped(ranks, partition)
        self.weight = nn.Parameter(torch.zeros(int(group.max()) + 1, width))  # W
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("balance", torch.zeros(len(group)))  # c
        self.load: torch.Tensor | None = None  # [2, R]: how often each rank was chosen, and could have been

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        if context.layer is None:
            raise ValueError("a rank gate sits at one layer and needs its experts")
        scores = torch.sigmoid(hidden.float() @ self.weight.float().T)[..., self.group] + self.balance  # [B, T, R]
        mask = functional.over_tokens(context.mask[..., context.layer.expert_index], scores)
        gates = shared_out(scores, mask, self.top)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._count(gates > 0, mask.expand_as(gates))
        return gates

    def _count(self, chosen: torch.Tensor, able: torch.Tensor) -> None:
        counts = torch.stack([chosen.flatten(0, -2).sum(0), able.flatten(0, -2).sum(0)])
        self.load = counts if self.load is None else self.load + counts

    def sensitivity(self) -> dict[str, float]:
        return {"weight": self.weight.shape[-1]}

    @torch.no_grad()
    def rebalance(self, over: Callable[[torch.Tensor], torch.Tensor] = lambda own: own) -> None:
        """c += rate * sign(mean load - load) over the ranks that could have been chosen. The count then starts again.

        The mean of these steps is taken off. It changes no choice, but would add up over updates, as c enters the value.

        Args:
            over: turns counts into their sum over all processes.
        """
        if self.load is None:
            return
        (chosen, able), self.load = over(self.load), None
        there = able > 0
        count = there.sum().clamp_min(1)
        step = torch.sign(chosen.sum() / count - chosen) * there
        self.balance += self.rate * (step - step.sum() / count) * there
