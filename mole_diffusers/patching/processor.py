"""The place of a gate: evaluated where a block begins, its weights lent to every expert layer of the block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from mole_diffusers import functional
from mole_diffusers.functional import onto
from mole_diffusers.gates import Context, Gate, Layer
from mole_diffusers.patching.runtime import Decision, Last, Present, State


class Asking(Protocol):
    """A layer that takes a gate's weights: its name, part first, and the experts that it has.

    Names are asked for where a plan needs them and not before: in what torch.compile has seen they are part of the code, and
    blocks that are alike would not share theirs.
    """

    layer: str
    present: Present


class Slot:
    """One gate at one place, and the weights it last gave for each set of present experts.

    `shared` says that the layers of the place use one decision; `timed` that the place knows the noise level (a text
    encoder does not); `whole` that it spans blocks, so that each layer multiplies its own block's strength; `far` that
    no layer's input can stand in for what the gate reads.
    """

    def __init__(self, name: str, gate: Gate, state: State, *, shared: bool, timed: bool, whole: bool):
        self.name, self.gate, self.state = name, gate, state
        self.shared, self.timed, self.whole = shared, timed, whole
        self.far = whole
        self.presents: list[Present] = []  # the first one is what a trace records
        self.scope: Present | None = None  # the experts the gate shares among, where its layers are not alone in that
        self.probe: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.weights: dict[Present, torch.Tensor] = {}
        self.factors: dict[Any, tuple[torch.Tensor, Any]] = {}  # for the layers' own use: weights, by rank
        self.batch = 0
        self.handed: torch.Tensor | None = None  # what the gate is to read when a layer first asks
        self.tokens: torch.Tensor | None = None
        self._last = Last()

    @property
    def part(self) -> str:
        """The host model it is in, "unet" say."""
        return self.name.partition(".")[0]

    @property
    def most(self) -> int | None:
        """How many experts weigh something in a row at most; None where that may be all."""
        count = getattr(self.state.control, "count", None)
        return None if self.gate.ranked or self.state.fixed is not None or self.state.plan is not None else count

    def clear(self) -> None:
        """Forget the last weights: the next layer that asks gets fresh ones."""
        self.weights, self.batch = {}, 0

    def refresh(self, hidden: torch.Tensor, layer: Layer | None = None, *, tokens: torch.Tensor | None = None) -> None:
        """Evaluate the gate on `hidden` [B, T, C], unless it would say, or is to say, what it said last.

        `layer` is given where the gate sits at that one layer, `tokens` [B, T] where only some of a text's count.
        """
        if not self._stands(hidden):
            self.factors = {}
            decisions = list(self._decide(hidden, layer, tokens))
            self._last.keep(self.gate, decisions, hidden=hidden, state=self.state)
        for decision in self._last.decisions:
            self.weights[decision.present] = decision.weights if decision.ranks is None else decision.ranks
            for listener in self.state.listeners:
                listener(decision)
        self.batch = hidden.shape[0]

    def hand(self, hidden: torch.Tensor, *, tokens: torch.Tensor | None = None) -> None:
        """Keep what the gate is to read, [B, T, C]; `read` evaluates it.

        At the entry of a whole model its weights may still be elsewhere: offloading brings them when forward begins. With
        gradients it is evaluated here: inside a block whose activations are computed again, it would be only the first time.
        """
        if torch.is_grad_enabled():
            self.refresh(hidden, tokens=tokens)
            return
        self.clear()
        self.handed, self.tokens, self.batch = hidden, tokens, hidden.shape[0]

    def speak(self) -> None:
        """Evaluate the gate on what it was handed, if that was not done yet."""
        if self.handed is not None:
            handed, self.handed = self.handed, None
            self.refresh(handed, tokens=self.tokens)

    def _stands(self, hidden: torch.Tensor) -> bool:
        """Whether the last decisions hold for `hidden`, too."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._last.fits(hidden, self.state):
            return False
        if self.timed and self.state.every > 1 and self._last.recent(self.state):
            return True
        seen = self.gate.blind or (self.probe is None and self._last.saw(hidden))
        return self.gate.steady and seen and self._last.knows(self.gate)

    def _by_hand(self) -> Sequence[float] | None:
        """The weights that stand in for the gate's, if any."""
        if self.state.fixed is None and self.state.plan is not None:
            return self.state.plan.gates(self.name)
        return self.state.fixed

    def _planned(self) -> Sequence[float] | None:
        """Each expert's strength here and now; None where it is the user's own."""
        state, plan = self.state, self.state.plan
        if plan is None:
            return None if state.fixed is None else [1.0] * len(state.active)
        strengths = state.strength if state.fixed is None else [1.0] * len(state.active)
        factors = [plan.part(self.part)] if self.whole else [plan.part(self.part), plan.block(self.name)]
        return [math.prod(row) for row in zip(strengths, *factors, strict=True)]

    def _decide(self, hidden: torch.Tensor, layer: Layer | None, tokens: torch.Tensor | None) -> Iterator[Decision]:
        fixed, strengths, device, rows = self._by_hand(), self._planned(), hidden.device, self._rows(hidden)
        factor = self.state.factor(device) if strengths is None else onto(torch.tensor(strengths), device)  # [N]
        factor = factor if rows is None else factor * rows  # [N] or [B, N]
        segment = layer.segment if layer is not None and self.gate.ranked else None
        if fixed is not None:
            for present in self.presents:
                gates = onto(torch.tensor([w * p for w, p in zip(fixed, present, strict=True)]), device)
                yield self._decision(present, gates if segment is None else gates[segment], factor, segment=segment)
            return
        time = self.state.time.to(device) if self.timed else torch.zeros(1, device=device)
        time = functional.rows(time, len(hidden))  # PAG hands single layers a part of the batch, films their frames
        with _full_precision(device):
            features = hidden if self.probe is None else self.probe(hidden.float())
            for present in self.presents:
                mask = self._mask(present, strengths, rows, device=device)
                among = mask if self.scope is None else self._mask(self.scope, strengths, rows, device=device)
                gates = self.gate(features, Context(among, time, layer, tokens))
                if self.state.control is not None:
                    gates = self.state.control(self.name, gates, mask if segment is None else mask[..., segment])
                yield self._decision(present, gates, factor, segment=segment)

    def _mask(
        self, present: Present, strengths: Sequence[float] | None, rows: torch.Tensor | None, *, device: torch.device
    ) -> torch.Tensor:
        if strengths is None:
            mask = self.state.mask(present, device)
        else:
            mask = onto(torch.tensor(self.state.there(present, strengths)), device)
        return mask if rows is None else mask & (rows != 0)

    def _decision(
        self, present: Present, gates: torch.Tensor, factor: torch.Tensor, *, segment: torch.Tensor | None
    ) -> Decision:
        """`gates` times `factor` [N] or [B, N]; with `segment` [R] the gates are per rank."""
        if segment is None:
            return Decision(self, present, gates, _times(gates, factor))
        mean = functional.by_expert(gates, segment, len(present))
        ranks = _times(gates, factor[..., segment])
        return Decision(self, present, mean, _times(mean, factor), ranks)

    def _rows(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[B, N]: each row's own factor per expert. A text encoder sees a prompt once, however many pictures it gets."""
        if self.state.rows is None:
            return None
        return functional.batch_rows(self.state.rows.to(hidden.device), len(hidden), self.state.images if self.timed else 1)

    def read(self, asking: Asking, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """The weights for a layer with input `x`; evaluated from `x` itself where nobody did so for this batch.

        That happens where every layer has a gate of its own, and when another processor took the place of ours
        (IP-Adapter, PAG) or splits the batch.
        """
        self.speak()
        if not self.shared or (self.batch != x.shape[0] and not (self.far and self.batch)):
            if x.dim() == 4 and x.shape[2:] != layer.low.shape[2:]:  # a strided convolution
                x = F.interpolate(x, layer.low.shape[2:])  # nearest, so that every token keeps its own weights
            self.refresh(functional.as_tokens(x), None if self.shared else layer)
        weights = self.weights[asking.present]
        if self.far and weights.dim() > 1:
            weights = functional.of_batch(weights, x.shape[0])
        if self.whole and self.state.plan is not None:
            block = onto(torch.tensor(self.state.plan.block(asking.layer)), weights.device)  # [N]
            weights = weights * (block[layer.segment] if self.gate.ranked else block)
        return weights


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: entering this context takes as long as a small gate, so only where there is something to leave."""
    casts = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if casts else nullcontext()


def _times(weights: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return weights * functional.over_tokens(factor, weights)


class MoLEAttnProcessor:
    """An attention processor that evaluates its block's gate and leaves the attention to the processor it found.

    diffusers filters keyword arguments by the signature of `processor.__call__`, so that of the found processor is
    shown. IP-Adapter makes `type(processor)()` anew: without arguments this is the default attention, and the block's
    layers evaluate the gate themselves.
    """

    def __new__(cls, host: Any = None, slot: Slot | None = None) -> MoLEAttnProcessor:
        # On a class, since calls are looked up there, by torch.compile too.
        mine: Any = cls
        kind: Any = type(host) if host is not None else AttnProcessor2_0
        return super().__new__(_showing(mine, kind))

    def __init__(self, host: Any = None, slot: Slot | None = None):
        self.host = host or AttnProcessor2_0()
        self.slot = slot

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, T, C] (or [B, C, H, W]) -> what the host's processor returns."""
        if self.slot is not None:
            self.slot.refresh(functional.as_tokens(hidden_states))
        return self.host(attn, hidden_states, *args, **kwargs)


@functools.cache
def _showing(cls: Any, kind: Any) -> Any:
    """`cls` with the signature that calls of `kind` have; torch.compile follows `__wrapped__` to it."""

    @functools.wraps(kind.__call__)
    def call(self: Any, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return cls.__call__(self, attn, hidden_states, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
