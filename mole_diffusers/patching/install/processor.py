"""The attention processor that evaluates its block's gate and leaves the attention to the original processor."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from mole_diffusers.functional import as_tokens
from mole_diffusers.patching.gating.gate_site import GateSite


class MoLEAttnProcessor:
    """Evaluates a gate on the input of the attention, then calls the model's own processor.

    diffusers filters keyword arguments by the signature of `processor.__call__`, so this class shows the signature of
    the model's processor. IP-Adapter creates a new one by `type(processor)()`. Without arguments this is the default
    attention, and the block's layers evaluate the gate themselves.
    """

    def __new__(cls, host: Any = None, site: GateSite | None = None) -> MoLEAttnProcessor:
        # On a class, since Python and torch.compile look up calls there.
        mine: Any = cls
        kind: Any = type(host) if host is not None else AttnProcessor2_0
        return super().__new__(_with_signature(mine, kind))

    def __init__(self, host: Any = None, site: GateSite | None = None):
        self.host = host or AttnProcessor2_0()
        self.site = site

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, T, C] (or [B, C, H, W]) -> the result of the model's own processor."""
        if self.site is not None:
            self.site.evaluate(as_tokens(hidden_states))
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
