"""The place of a gate: evaluated where a block begins, its weights lent to every expert layer of the block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

Present = tuple[bool, ...]  # which of the N experts a layer has


@dataclass
class State:
    """What all gates of a mixture share: who is active, how strong, and where sampling stands."""

    active: list[bool]
    strength: list[float]
    time: torch.Tensor = field(default_factory=lambda: torch.zeros(1))  # [B], 1 is pure noise
    step: int = -1  # counts denoiser calls; -1 before the first
    listeners: list[Callable[[str, torch.Tensor], None]] = field(default_factory=list)

    def mask(self, present: Present, device: torch.device) -> torch.Tensor:
        """[N] bool: experts that are present, active and not at strength 0."""
        rows = zip(present, self.active, self.strength, strict=True)
        return torch.tensor([p and a and s != 0 for p, a, s in rows], device=device)


class Slot:
    """One gate at one place, and the weights it last gave for each set of present experts."""

    def __init__(self, name: str, gate: Callable, state: State, *, shared: bool = True):
        self.name, self.gate, self.state, self.shared = name, gate, state, shared
        self.presents: list[Present] = []  # the first one is what a trace records
        self.probe: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.weights: dict[Present, torch.Tensor] = {}
        self.batch = 0

    def clear(self) -> None:
        """Forget the last weights: the next layer that asks gets fresh ones."""
        self.weights, self.batch = {}, 0

    def refresh(self, hidden: torch.Tensor) -> None:
        """Evaluate the gate on `hidden` [B, T, C]."""
        features = hidden if self.probe is None else self.probe(hidden)
        time = self.state.time.to(hidden.device).expand(hidden.shape[0] if len(self.state.time) == 1 else -1)
        strength = torch.tensor(self.state.strength, device=hidden.device)
        for present in self.presents:
            weights = self.gate(features, self.state.mask(present, hidden.device), time)
            self.weights[present] = weights * strength  # [N] or [B, N]
        self.batch = hidden.shape[0]
        for listener in self.state.listeners:
            listener(self.name, self.weights[self.presents[0]])

    def read(self, present: Present, x: torch.Tensor) -> torch.Tensor:
        """The weights for a layer with input `x`; evaluated from `x` itself where nobody did so for this batch.

        That happens when another processor took the place of ours (IP-Adapter, PAG), or splits the batch.
        """
        if not self.shared or self.batch != x.shape[0]:
            self.refresh(as_tokens(x))
        return self.weights[present]


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """[B, C], [B, T, C] or [B, C, H, W] -> [B, T, C]."""
    if x.dim() == 4:
        return x.flatten(2).transpose(1, 2)
    return x if x.dim() == 3 else x[:, None]


class MoLEAttnProcessor:
    """An attention processor that evaluates its block's gate and leaves the attention to the processor it found.

    diffusers filters keyword arguments by the signature of `processor.__call__`, so that of the found processor is
    shown. IP-Adapter makes `type(processor)()` anew: without arguments this is the default attention, and the block's
    layers evaluate the gate themselves.
    """

    def __init__(self, host: Callable | None = None, slot: Slot | None = None):
        self.host = host or AttnProcessor2_0()
        self.slot = slot
        self.__call__ = functools.wraps(self.host.__call__)(functools.partial(type(self).__call__, self))
        self.__call__.__signature__ = inspect.signature(self.host.__call__)  # type: ignore[attr-defined]

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """hidden_states [B, T, C] (or [B, C, H, W]) -> what the host's processor returns."""
        if self.slot is not None:
            self.slot.refresh(as_tokens(hidden_states))
        return self.host(attn, hidden_states, *args, **kwargs)
