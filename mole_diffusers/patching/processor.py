"""The attention processor that evaluates its block's gate and leaves the attention to the processor it found."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from mole_diffusers.functional import as_tokens
from mole_diffusers.patching.gate_site import GateSite


class MoLEAttnProcessor:
    """Evaluates a gate on what enters the attention, then calls the host's processor.

    diffusers filters keyword arguments by the signature of `processor.__call__`, so that of the host's processor is shown.
    IP-Adapter makes `type(processor)()` anew: without arguments this is the default attention, and the block's layers
    evaluate the gate themselves.
    """

    def __new__(cls, host: Any = None, site: GateSite | None = None) -> MoLEAttnProcessor:
        # On a class, since calls are looked up there, by torch.compile too.
        mine: Any = cls
        kind: Any = type(host) if host is not None else AttnProcessor2_0
        return super().__new__(_with_signature(mine, kind))

    def __init__(self, host: Any = None, site: GateSite | None = None):
        self.host = host or AttnProcessor2_0()
        self.site = site

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, T, C] (or [B, C, H, W]) -> what the host's processor returns."""
        if self.site is not None:
            self.site.evaluate(as_tokens(hidden_states))
        return self.host(attn, hidden_states, *args, **kwargs)


@functools.cache
def _with_signature(cls: Any, kind: Any) -> Any:
    """`cls` with the signature that calls of `kind` have; torch.compile follows `__wrapped__` to it."""

    @functools.wraps(kind.__call__)
    def call(self: Any, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return cls.__call__(self, attn, hidden_states, *args, **kwargs)

    # Found ready, since diffusers asks at every call. torch.compile refuses a mapping that cannot be changed.
    signature: Any = inspect.signature(kind.__call__)
    signature._parameters = dict(signature.parameters)
    call.__signature__ = signature  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
