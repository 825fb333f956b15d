"""What a gate decided, and who is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mole_diffusers import functional
from mole_diffusers.binding.picture_layout import Layout
from mole_diffusers.patching.gating.settings import Setting

Present = tuple[bool, ...]  # which of the N experts a layer has


class Decision(NamedTuple):
    """The weights of one gate for the layers with one set of experts."""

    location: Any  # the gate's gate location, which has a name
    present: Present  # which experts these layers have; a gate location's first decision is for the largest set
    output: torch.Tensor  # [N], [B, N] or [B, T, N], the gate's output; for a gate per rank, R instead of N
    # The same times the user's strengths. The layers are multiplied by this, and by masks of tokens. Layers outside of
    # blocks, which share one gate, are also multiplied by a plan's strengths for where each is.
    applied: torch.Tensor
    mask: torch.Tensor  # [N] or [B, N] bool: experts that are present, active and not at strength 0
    expert_index: torch.Tensor | None  # [R], the expert of each rank, if the gate weighs ranks

    @property
    def name(self) -> str:
        """The gate location's name, component first.

        Only listeners read it: a name would make torch.compile compile every block separately.
        """
        return self.location.name

    @property
    def gates(self) -> torch.Tensor:
        """The gate's output per expert, [N], [B, N] or [B, T, N]; for a gate per rank, the mean over each expert's ranks."""
        return self._by_expert(self.output)

    @property
    def weights(self) -> torch.Tensor:
        """The same times the user's strengths."""
        return self._by_expert(self.applied)

    def _by_expert(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.expert_index is None else functional.by_expert(values, self.expert_index, len(self.present))


HearsDecision = Callable[[Decision], None]
HearsMaps = Callable[[list[dict[str, torch.Tensor]]], None]  # name -> map [h, w] of one layer, for each picture
HearsLayouts = Callable[[list[Layout]], None]  # one for each picture of a call that has ended


@dataclass(frozen=True)
class Listeners:
    """Who is told of each gate's decisions, of each layer's maps of attention (then every step is read), and of layouts."""

    decisions: Setting[tuple[HearsDecision, ...]] = field(default_factory=lambda: Setting(()))
    maps: Setting[tuple[HearsMaps, ...]] = field(default_factory=lambda: Setting(()))
    layouts: Setting[tuple[HearsLayouts, ...]] = field(default_factory=lambda: Setting(()))
