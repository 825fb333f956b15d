"""What tells the gate locations that a block begins, and gives them what their gates read: a processor where the model has
attention processors, hooks elsewhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from mole_diffusers import functional
from mole_diffusers.patching.gating.gate_location import BlockLocation, GateLocation, ModelLocation, OutputLocation
from mole_diffusers.patching.gating.prompt_tokens import PromptTokens
from mole_diffusers.patching.gating.shared_state import SharedState
from mole_diffusers.patching.hooks import ForwardHook
from mole_diffusers.patching.host.placement import TIME_WIDTH
from mole_diffusers.patching.undo import Undo


class MoLEAttnProcessor:
    """Evaluates a gate on the input of the attention, then calls the model's own processor.

    diffusers filters keyword arguments by the signature of `processor.__call__`, so this class shows the signature of
    the model's processor. IP-Adapter creates a new one by `type(processor)()`. Without arguments this is the default
    attention, and the block's layers evaluate the gate themselves.
    """

    def __new__(cls, host: Any = None, location: GateLocation | None = None) -> MoLEAttnProcessor:
        # On a class, since Python and torch.compile look up calls there.
        mine: Any = cls
        kind: Any = type(host) if host is not None else AttnProcessor2_0
        return super().__new__(_with_signature(mine, kind))

    def __init__(self, host: Any = None, location: GateLocation | None = None):
        self.host = host or AttnProcessor2_0()
        self.location = location

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, T, C] (or [B, C, H, W]) -> the result of the model's own processor."""
        if self.location is not None:
            self.location.evaluate(functional.as_tokens(hidden_states))
        return self.host(attn, hidden_states, *args, **kwargs)


@functools.cache
def _with_signature(cls: Any, kind: Any) -> Any:
    """`cls` with the signature of calls of `kind`; torch.compile finds it through `__wrapped__`."""

    @functools.wraps(kind.__call__)
    def call(self: Any, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return cls.__call__(self, attn, hidden_states, *args, **kwargs)

    # Computed once, since diffusers asks at every call. torch.compile refuses a read-only mapping.
    signature: Any = inspect.signature(kind.__call__)
    signature._parameters = dict(signature.parameters)
    call.__signature__ = signature  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


@dataclass(eq=False)
class AroundBlock(ForwardHook):
    """On a block: its gate must be evaluated again when it begins, and what the gate decided is let go when it ends."""

    location: BlockLocation

    def register(self, module: nn.Module, undo: Undo) -> None:
        super().register(module, undo)
        undo.after_forward(module, self.after)

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.location.begin_block()

    def after(self, *_: object) -> None:
        self.location.end_block()


@dataclass(eq=False)
class OutputMixing(ForwardHook):
    """On a block: runs it again with each expert alone, and adds what they change, weighed by the gate, to its output."""

    location: OutputLocation

    def register(self, module: nn.Module, undo: Undo) -> None:
        super().register(module, undo)
        undo.hook(module.register_forward_hook, self.after, with_kwargs=True)

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.location.begin(args[0] if args else kwargs["hidden_states"])

    def after(self, module: Any, args: tuple, kwargs: dict[str, Any], base: Any) -> torch.Tensor | None:
        """The first run, which has ended, was without experts."""
        if not self.location.mixes:
            return None
        if not isinstance(base, torch.Tensor):
            raise ValueError(
                f"gates that weigh outputs of blocks need blocks with one output, unlike {type(module).__name__}"
            )
        changes = [torch.zeros_like(base)] * len(self.location.layer_adapters[0])
        for expert in self.location.experts:
            self.location.take(expert)
            changes[expert] = module.forward(*args, **kwargs) - base
        return base + self.location.mixed(torch.stack(changes))


@dataclass(eq=False)
class GateInput(ForwardHook):
    """On a module whose input a gate reads, where `MoLEAttnProcessor` does not pass it on."""

    location: GateLocation
    tokens: PromptTokens | None  # in a text encoder, knows which tokens are words

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        words = None if self.tokens is None else self.tokens.current
        self.location.evaluate(functional.as_tokens(args[0] if args else kwargs["hidden_states"]), tokens=words)


@dataclass(eq=False)
class ModelInput(ForwardHook):
    """On the denoiser: gives gate locations the text if they read the prompt, otherwise its mean and the noise level."""

    locations: Sequence[ModelLocation]
    shared: SharedState
    reads_prompt: bool

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = self.shared.inputs
        hidden, tokens = inputs.text(args, kwargs), None  # [B, T, C]
        if self.reads_prompt:
            tokens = self.shared.tokens.of(hidden)
        else:
            time = inputs.time(args, kwargs)  # [B]
            text = functional.resample_rows(hidden, len(time)).float()  # a video repeats it for each frame
            time = get_timestep_embedding(1000 * time, TIME_WIDTH)  # [B, TIME_WIDTH]
            hidden = torch.cat([text.mean(1), time], -1)[:, None]  # [B, 1, C + TIME_WIDTH]
        for location in self.locations:
            location.defer(hidden, tokens=tokens)
