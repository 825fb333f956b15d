"""SMoRA (Zhao et al., 2025, arXiv 2501.15103): every rank of every expert is an expert of its own."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates.contract import Context
from mole_diffusers.lora import LoraWeights
from mole_diffusers.lora.stacking import Stack


def shared_out(scores: torch.Tensor, mask: torch.Tensor, top: int) -> torch.Tensor:
    """SMoRA's gates: of positive scores [..., R] the `top` largest in `mask`, brought to mean 1 among themselves.

    `top` 0, or more than there are, keeps all of them. `mask` broadcasts over `scores`.
    """
    chosen = functional.among_largest(scores.masked_fill(~mask, -torch.inf), top) & mask
    kept = scores * chosen
    return kept * chosen.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-12)


def singular(stack: Stack) -> Stack:
    """The same delta W of every expert, its ranks turned to its singular directions, the largest first.

    Ranks of a trained LoRA are arbitrary, B A = (B Q)(Q^-1 A), and so would be gates of single ranks.
    """
    rows: list[LoraWeights | None] = []
    for down, up in zip(stack.down.split(list(stack.ranks)), stack.up.split(list(stack.ranks), 1), strict=True):
        rows.append(LoraWeights(*functional.low_rank(down, up, len(down))[:2], 1.0) if len(down) else None)
    return Stack(tuple(rows), stack.inner)


def grouped(ranks: Sequence[int], partition: int) -> torch.Tensor:
    """[R] -> the router's output for each rank: `partition` ranks of an expert share one, or all of its own where 0."""
    groups: list[int] = []
    for rank in ranks:
        first = groups[-1] + 1 if groups else 0
        groups += [first + j // (partition or rank) for j in range(rank)]
    return torch.tensor(groups)


def _rebalance(gate: RankGate | None) -> None:
    if gate is not None and not gate.held:
        gate.rebalance()


class RankGate(nn.Module):
    """z = sigmoid(W x) + c per token and rank, the k largest z brought to mean 1, the others 0 (SMoRA, eq. 6-9).

    W begins at zero, which weighs all ranks 1 where k takes them all. c evens out the load without a loss: when a backward
    pass reaches W, it rises by `rate` for a rank that was chosen less than the mean since the last, and falls for one that
    was chosen more. As in the authors' code, c also enters the gate's value. The LoRAs keep their own alpha / r (the paper,
    which trains its ranks from scratch, has alpha / k); with k below R less is added in all, which strengths can make up.

    Args:
        ranks: [N], of each expert in this layer.
        top: k; 0 keeps all.
        partition: this many ranks of an expert share one output of the router; 0: all that it has, so that whole experts
            compete.
    """

    step_invariant, input_free, ranked = False, False, True
    group: torch.Tensor
    balance: torch.Tensor

    def __init__(self, width: int, ranks: Sequence[int], *, top: int, partition: int, rate: float):
        super().__init__()
        self.top, self.rate = top, rate
        group = grouped(ranks, partition)
        self.weight = nn.Parameter(torch.zeros(int(group.max()) + 1, width))  # W
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("balance", torch.zeros(len(group)))  # c
        self.load: torch.Tensor | None = None  # [2, R]: how often each rank was chosen, and could have been, since
        self.held = False  # while it is, somebody else calls `rebalance`, when all parts of a batch are counted
        gate = weakref.ref(self)  # Python's collector does not see hooks of tensors
        self.weight.register_post_accumulate_grad_hook(lambda _: _rebalance(gate()))

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        if context.layer is None:
            raise ValueError("a rank gate sits at one layer and needs its experts")
        scores = torch.sigmoid(hidden.float() @ self.weight.float().T)[..., self.group] + self.balance  # [B, T, R]
        mask = functional.over_tokens(context.mask[..., context.layer.segment], scores)
        gates = shared_out(scores, mask, self.top)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._count(gates > 0, mask.expand_as(gates))
        return gates

    def _count(self, chosen: torch.Tensor, able: torch.Tensor) -> None:
        counts = torch.stack([chosen.flatten(0, -2).sum(0), able.flatten(0, -2).sum(0)])
        self.load = counts if self.load is None else self.load + counts

    @torch.no_grad()
    def rebalance(self) -> None:
        """c += rate * sign(mean load - load) over the ranks that could have been chosen; the count begins anew."""
        if self.load is None:
            return
        (chosen, able), self.load = self.load, None
        mean = chosen.sum() / (able > 0).sum().clamp_min(1)
        self.balance += self.rate * torch.sign(mean - chosen) * (able > 0)
