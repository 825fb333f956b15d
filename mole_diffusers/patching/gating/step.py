"""Where sampling is: the noise level, how many steps there were, the text, and the pipeline that runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from mole_diffusers.patching.gating.settings import Setting


class Step:
    """The denoiser's call that runs, or that ran last.

    Attributes:
        time: [B], its noise level in 0..1, where 1 is pure noise.
        number: counts calls, except those for a part of a step; -1 before the first.
        texts: counts texts.
        calls_of_text: counts calls with the same text.
        is_off: whether no expert acts in it: the pipeline has switched LoRAs off.
        pipe: the pipeline, while a call of it runs.
        part: [N], in a call for a part of a step: the experts that draw it, on every word. They are alike in every step.
    """

    def __init__(self) -> None:
        self.time = torch.zeros(1)
        self.number, self.texts, self.calls_of_text, self.is_off = -1, 0, 0, False
        self.pipe: Setting[Any] = Setting(None)
        self.part: Setting[tuple[bool, ...] | None] = Setting(None)
        self._text: Callable[[], torch.Tensor | None] = lambda: None

    def begin(self, text: torch.Tensor, time: torch.Tensor, *, is_off: bool) -> None:
        """The denoiser is called with a text [B, S, C], at a noise level [B]."""
        self.time, self.is_off = time, is_off
        self.number, self.calls_of_text = self.number + (self.part.now is None), self.calls_of_text + 1
        if self._text() is not text:
            self.calls_of_text, self.texts, self._text = 0, self.texts + 1, weakref.ref(text)

    def begin_compiled(self, time: torch.Tensor, *, is_heard: bool) -> None:
        """The same in compiled code. It is counted only if it is heard: a counter compiles the model anew at every step."""
        self.time = time
        self.number += is_heard
