"""What the user set: outside of all `with` blocks, and in each block that runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

from mole_diffusers.gates.transforms import Control
from mole_diffusers.patching.gating.token_masks import TokenMasks
from mole_diffusers.patching.subjects.prompt_subjects import Tiling

T = TypeVar("T")


class Setting(Generic[T]):
    """One setting: a value outside of blocks, and one for each running block that changes it.

    Attributes:
        now: the value that holds, which the last of these blocks gave.
    """

    def __init__(self, value: T):
        self.now = value
        self._values = [Change(self, value)]  # outside of blocks, then in each

    def set(self, value: T) -> None:
        """Change the value in the block that it comes from, if any."""
        self._values[-1].value = self.now = value

    def to(self, value: T) -> Change[T]:
        """A change to this value, for a block."""
        return Change(self, value)

    @property
    def outside(self) -> T:
        """The value outside of all running blocks."""
        return self._values[0].value

    def begin(self, change: Change[T]) -> None:
        """The block of a change begins."""
        self._values.append(change)
        self.now = change.value

    def end(self, change: Change[T]) -> None:
        """The block of a change has ended. In generators, blocks may end in any order."""
        self._values = [each for each in self._values if each is not change]
        self.now = self._values[-1].value


@dataclass(eq=False)
class Change(Generic[T]):
    """A setting's value in one block."""

    setting: Setting[T]
    value: T


@runtime_checkable
class StrengthPlan(Protocol):
    """A strength schedule: the user's strengths by component, block and step, on top of `Mixture.strength`.

    Each method gives one factor per expert, [N]; 0 means absent there, and the gate shares among the others.
    """

    def part(self, part: str) -> Sequence[float]:
        """For a whole component, "unet" or "text_encoder", at this step."""

    def block(self, module: str) -> Sequence[float]:
        """For the block that contains `module` (a gate location or a layer, component first)."""

    def gates(self, place: str) -> Sequence[float] | None:
        """Weights that replace those of the gate at `place`; None keeps the gate's weights."""


class PlainSum:
    """A plan in which every gate gives 1, so that only the user's strengths count."""

    def __init__(self, experts: int):
        self.ones = [1.0] * experts

    def part(self, _: str) -> Sequence[float]:
        return self.ones

    block = gates = part


class RowSets(NamedTuple):
    """Sets of experts that differ within a batch."""

    factors: torch.Tensor  # [b, N], one for each prompt and expert
    images: int  # pictures per prompt in the denoiser's batch


@dataclass(frozen=True)
class Settings:
    """Everything that a user can set."""

    active: Setting[Sequence[bool]]  # [N], which experts are switched on
    strengths: Setting[list[float]]  # [N]
    fixed: Setting[Sequence[float] | None] = field(default_factory=lambda: Setting(None))  # [N], by hand for every gate
    rows: Setting[RowSets | None] = field(default_factory=lambda: Setting(None))
    control: Setting[Control | None] = field(default_factory=lambda: Setting(None))  # transforms every gate's output
    every: Setting[int] = field(default_factory=lambda: Setting(1))  # gates are evaluated once in so many of its calls
    plan: Setting[StrengthPlan | None] = field(default_factory=lambda: Setting(None))
    # Each expert's words and place, and what they mean for the texts and pictures of this moment.
    binding: Setting[TokenMasks | None] = field(default_factory=lambda: Setting(None))
    tiling: Setting[Tiling] = field(default_factory=lambda: Setting(Tiling()))
    folded: Setting[bool] = field(default_factory=lambda: Setting(False))  # into the model's weights

    @property
    def acting(self) -> list[bool]:
        """[N]: the experts that are on, and not at strength 0."""
        return [on and strength != 0 for on, strength in zip(self.active.now, self.strengths.now, strict=True)]
