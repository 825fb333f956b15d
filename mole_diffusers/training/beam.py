"""BeamLoRA (arXiv 2502.13604, ACL 2025): ranks of a LoRA compete in training; copies of strong ones replace weak ones.

A layer's change is up (pi * (down x)) with pi = r softmax(g / temperature) over its r ranks. g starts at zero, which is
plain LoRA. The number of ranks never changes, and pi is folded into `down` when the LoRA is saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from mole_diffusers.training.config import LoraTraining

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state of a parameter


class Ranks(NamedTuple):
    """The ranks of one layer in training."""

    logits: nn.Parameter  # g, [r]
    down: nn.Parameter  # [r, Cin, ...]
    up: nn.Parameter  # [Cout, r, ...]


def importance(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """pi [r], mean 1: how much each rank counts."""
    return len(logits) * torch.softmax(logits / temperature, 0)


def kept_share(step: int, end: float) -> float:
    """p: the share of all importance that pruning keeps, from 0.95 at step 0 on a half cosine to 1 at `end`."""
    return 1.0 if step >= end else 1 - 0.05 * (1 + math.cos(math.pi * step / end)) / 2


def period(steps: int) -> int:
    """Updates between prunings: 8 % of all, as in the paper (3000 of 37 000), but at least 50, and even."""
    return 2 * round(max(50, 0.08 * steps) / 2)


def pruned(importances: Sequence[torch.Tensor], share: float) -> list[list[int]]:
    """The ranks of each layer to replace, the weakest first.

    Sort the importances [r] of all layers in falling order. The ranks to replace begin where the running sum passes
    `share` of the total. At most half of a layer is replaced, so that each such rank has another one to copy.
    """
    if share >= 1:
        return [[] for _ in importances]
    joined = torch.cat([pi.double() for pi in importances])
    order = joined.argsort(descending=True, stable=True)
    first = int((joined[order].cumsum(0) <= share * joined.sum()).sum())
    gone = torch.zeros(len(joined), dtype=torch.bool)
    gone[order[first:].cpu()] = True
    rows = gone.split([len(pi) for pi in importances])
    return [[i for i in reversed(ranked(pi)) if row[i]][: len(pi) // 2] for pi, row in zip(importances, rows, strict=True)]


def ranked(importances: torch.Tensor) -> list[int]:
    """Indices of importances [r], the strongest first. The earlier of equals comes first, so no rank is at both ends."""
    return importances.argsort(descending=True, stable=True).tolist()


@dataclass
class Beams:
    """The competition among the ranks of one LoRA, over all its layers.

    Attributes:
        config: its steps determine the schedule.
        past: layer -> down, up and their moments half a period ago, ranks first. A copy takes the source's values from
            then: two equal ranks would get equal gradients and stay equal.
    """

    layers: Mapping[str, Ranks]
    optimizer: torch.optim.Optimizer
    config: LoraTraining
    past: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Call it after each update; the first is step 1."""
        every = period(self.config.steps)
        if step % every == every // 2:
            self.past = {name: [v.clone() for v in self._by_rank(ranks)] for name, ranks in self.layers.items()}
        if step % every == 0 and self.config.steps - step >= every:
            self._expand(step)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return self.past

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.past = state

    def _expand(self, step: int) -> None:
        pis = [importance(ranks.logits, self.config.temperature) for ranks in self.layers.values()]
        gone = pruned(pis, kept_share(step, self.config.steps * 2 / 3))
        generator = torch.Generator().manual_seed(self.config.seed + step)
        for (name, ranks), pi, slots in zip(self.layers.items(), pis, gone, strict=True):
            if slots:
                best = ranked(pi)[: len(slots)]
                pairs = torch.randperm(len(slots), generator=generator).tolist()
                self._replace(name, ranks, slots, [best[i] for i in pairs])

    def _replace(self, name: str, ranks: Ranks, slots: list[int], sources: list[int]) -> None:
        """Replace each slot by its source's past values. The two share their importance, and the moments of g are reset."""
        for values, past in zip(self._by_rank(ranks), self.past[name], strict=True):
            values[slots] = past[sources].to(values.device)
        shared = (ranks.logits[slots] + ranks.logits[sources]) / 2
        ranks.logits[slots], ranks.logits[sources] = shared, shared
        for moment in MOMENTS:
            self.optimizer.state[ranks.logits][moment].zero_()

    def _by_rank(self, ranks: Ranks) -> list[torch.Tensor]:
        """Views of everything that a rank has, [r, ...] each."""
        kept = self.optimizer.state
        down = [ranks.down.data, *(kept[ranks.down][moment] for moment in MOMENTS)]
        up = [ranks.up.data, *(kept[ranks.up][moment] for moment in MOMENTS)]
        return down + [value.transpose(0, 1) for value in up]
