"""Which tokens of a text's states are its words: noted when a text encoder runs, and found again by the states."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn


def words(ids: torch.Tensor, end: int | None = None) -> torch.Tensor:
    """Token ids [B, T] -> bool [B, T]: what comes before the padding (the last token, repeated), less `end`'s tokens."""
    padding = (ids == ids[:, -1:]).flip(1).int().cumprod(1).flip(1).bool()
    return ~padding if end is None else ~padding & (ids != end)


class Words:
    """The words of the last texts that were encoded.

    Attributes:
        current: [B, T] bool, of the text that a text encoder is reading or read last; None before the first.
    """

    def __init__(self, memory: int = 8):
        self.current: torch.Tensor | None = None
        self._known: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=memory)

    def watch(self, encoder: Any, undo: ExitStack) -> None:
        """Note what `encoder` is given and what it makes of it."""
        end = getattr(encoder.config, "eos_token_id", None)

        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            ids = args[0] if args else kwargs["input_ids"]
            attended = kwargs.get("attention_mask")
            self.current = words(ids, end) if attended is None else words(ids, end) & attended.bool()

        def after(_: nn.Module, __: tuple, output: Any) -> None:
            states = [output[0], *(getattr(output, "hidden_states", None) or ())]
            self._known += [(s.detach(), self.current) for s in states if s.dim() == 3 and self.current is not None]

        undo.callback(encoder.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(encoder.register_forward_hook(after).remove)

    def of(self, text: torch.Tensor) -> torch.Tensor | None:
        """The words of states [B, T, C] as a denoiser gets them: [B, T] bool, or None where a row is not known.

        A row is found by its values: guidance puts rows of several texts together, several pictures repeat them, and
        SDXL joins two encoders' channels.
        """
        for states, known in reversed(self._known):
            if _are(states, text):
                return known.to(text.device)
        rows = [self._row(row) for row in text.detach()]
        found = [row for row in rows if row is not None]
        return torch.stack(found) if len(found) == len(rows) else None

    def _row(self, row: torch.Tensor) -> torch.Tensor | None:
        for states, known in reversed(self._known):
            width = states.shape[-1]
            if states.shape[1] == len(row) and width <= row.shape[-1]:
                same = (states.to(row.device, row.dtype) == row[:, :width]).flatten(1).all(1)  # [b]
                if same.any():
                    return known.to(row.device)[same.int().argmax()]
        return None


def _are(states: torch.Tensor, text: torch.Tensor) -> bool:
    """Whether the two are the same memory, so that no device must be waited for to compare them."""
    alike = (states.shape, states.stride(), states.dtype) == (text.shape, text.stride(), text.dtype)
    return alike and states.data_ptr() == text.data_ptr()
