"""What the gates of a mixture share, what each of them said, and what a user lays on top."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from mole_diffusers.functional import onto, version
from mole_diffusers.gates import Gate
from mole_diffusers.gates.transforms import Control
from mole_diffusers.patching.prompt_tokens import Words

Present = tuple[bool, ...]  # which of the N experts a layer has


class Named(Protocol):
    """What sits at a place: the module's name, part first."""

    name: str


@dataclass(frozen=True)
class Decision:
    """What one gate said for one set of present experts.

    Attributes:
        of: whose gate it is.
        present: which experts the layers have; the first decision of a place is for the largest set.
        gates: [N], [B, N] or [B, T, N] as the gate gave them; for a gate per rank, the mean over each expert's ranks.
        weights: the same times the user's strengths, which is what the layers are multiplied by.
        ranks: what they are multiplied by instead where the gate speaks per rank, [R] or [B, T, R].
    """

    of: Named
    present: Present
    gates: torch.Tensor
    weights: torch.Tensor
    ranks: torch.Tensor | None = None

    @property
    def place(self) -> str:
        """Where the gate sits."""
        return self.of.name


class Plan(Protocol):
    """The user's strengths by part, block and moment, on top of `Mixture.strength`; asked again at every step.

    Each gives one factor per expert, [N]; 0 means absent there, and the gate shares among the others.
    """

    def part(self, part: str) -> Sequence[float]:
        """For a whole part, "unet" or "text_encoder", at this moment."""
        ...

    def block(self, module: str) -> Sequence[float]:
        """For the block that `module` lies in (a place or a layer, part first)."""
        ...

    def gates(self, place: str) -> Sequence[float] | None:
        """Weights that stand in for the gate at `place`; None leaves it to the gate."""
        ...


@dataclass
class State:
    """What all gates of a mixture share: who is active, how strong, and where sampling stands.

    Who changes it calls `settle` afterwards. The gates read `active` and `strength` as tensors, which a compiled model takes
    as they come: as numbers they would be part of its code.
    """

    active: list[bool]
    strength: list[float]
    time: torch.Tensor = field(default_factory=lambda: torch.zeros(1))  # [B], 1 is pure noise
    fixed: list[float] | None = None  # weights that stand in for every gate's, by hand or for a teacher
    rows: torch.Tensor | None = None  # [b, N], a factor per prompt and expert: sets that differ within a batch
    images: int = 1  # pictures per prompt in the denoiser's batch, where `rows` is set
    control: Control | None = None  # changes what every gate gives
    every: int = 1  # the denoiser's gates are asked in one of so many of its calls
    step: int = -1  # counts denoiser calls; -1 before the first
    run: int = 0  # the same for one text
    texts: int = 0  # how many texts have come
    listeners: list[Callable[[Decision], None]] = field(default_factory=list)
    plan: Plan | None = None
    words: Words = field(default_factory=Words)
    changes: int = 0
    _tensors: dict[tuple[Present | None, torch.device], torch.Tensor] = field(default_factory=dict)
    _text: Callable[[], torch.Tensor | None] = lambda: None

    def set(self, **values: Any) -> None:
        vars(self).update(values)
        self.settle()

    def entered(self, time: torch.Tensor, text: torch.Tensor) -> None:
        """The denoiser is called; another text is another run."""
        self.time = time
        if torch.compiler.is_compiling():  # a number that counts would have the model compiled again at every step
            self.step += bool(self.listeners)
            return
        self.step, self.run = self.step + 1, self.run + 1
        if self._text() is not text:
            self.run, self.texts, self._text = 0, self.texts + 1, weakref.ref(text)

    def settle(self) -> None:
        """Bring what the gates read up to date."""
        self.changes += 1
        for key in self._tensors:
            self._tensors[key] = self._made(*key)

    def factor(self, device: torch.device) -> torch.Tensor:
        """[N]: each expert's strength."""
        return self._tensor(None, device)

    def mask(self, present: Present, device: torch.device) -> torch.Tensor:
        """[N] bool: experts that are present, active and not at strength 0."""
        return self._tensor(present, device)

    def there(self, present: Present, strengths: Sequence[float]) -> list[bool]:
        """`mask` by any strengths."""
        return [p and a and s != 0 for p, a, s in zip(present, self.active, strengths, strict=True)]

    def _tensor(self, present: Present | None, device: torch.device) -> torch.Tensor:
        if (present, device) not in self._tensors:
            self._tensors[present, device] = self._made(present, device)
        return self._tensors[present, device]

    def _made(self, present: Present | None, device: torch.device) -> torch.Tensor:
        values = self.strength if present is None else self.there(present, self.strength)
        return onto(torch.tensor(values), device)


class Last:
    """What a gate last said, and what about."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self._moment = (0, -1)  # the text, and the call with it
        self._about: tuple[Any, ...] = ()
        self._hidden: Callable[[], torch.Tensor | None] = lambda: None
        self._versions = (0, 0)

    def keep(self, gate: Gate, decisions: list[Decision], *, hidden: torch.Tensor, state: State) -> None:
        self.decisions, self._about = decisions, ()
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self._moment, self._about = (state.texts, state.run), self._seen_from(hidden, state)
            self._hidden, self._versions = weakref.ref(hidden), (version(hidden), learned(gate))

    def fits(self, hidden: torch.Tensor, state: State) -> bool:
        """Whether it was about a batch of this shape, under these settings; plans and controls may change their mind."""
        return state.plan is None and state.control is None and self._about == self._seen_from(hidden, state)

    def recent(self, state: State) -> bool:
        """Whether it was in the same `state.every` calls with one text."""
        text, run = self._moment
        return text == state.texts and run // state.every == state.run // state.every

    def saw(self, hidden: torch.Tensor) -> bool:
        """Whether it was about these very states; tensors of inference mode do not show whether they were changed since."""
        return not hidden.is_inference() and self._hidden() is hidden and self._versions[0] == version(hidden)

    def knows(self, gate: Gate) -> bool:
        """Whether the gate has learned nothing since."""
        return self._versions[1] == learned(gate)

    @staticmethod
    def _seen_from(hidden: torch.Tensor, state: State) -> tuple[Any, ...]:
        return hidden.shape[:2], hidden.device, state.changes


def learned(gate: Gate) -> int:
    """How often a gate's parameters and buffers were changed."""
    return sum(version(t) for t in itertools.chain(gate.parameters(), gate.buffers()))
