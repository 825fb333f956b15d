"""What cross-attention makes of the prompt, kept for the steps of a call: its keys and values read the same text in each.

Gates and strengths may differ between steps, so a layer keeps what comes before them, W x and A x. Where its factor
stays the same, too, it keeps their sum instead, and a step does nothing there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mole_diffusers.gates.seen import version

MOST_TEXTS = 2  # kept at once: guidance may call the denoiser for each of its texts separately
MOST_ROWS = 4  # of a text, those of two pictures with guidance: in half precision, SDXL's keys and values of them are 102 MB


@dataclass(eq=False)
class TextProducts:
    """What one layer made of one text, as rows.

    Attributes:
        weights: the versions of the weights that it was made with.
        low: A x, [B T, R].
        plain: W x, [B T, Cout]; None while `whole` is kept.
        whole: the layer's output, [B, T, Cout], with `factor`; None if each step has a factor of its own.
        unchanged: the version of `whole` when it was kept: a processor of attention may write into it.
    """

    weights: tuple[int, int]
    low: torch.Tensor
    plain: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    unchanged: int = 0

    def keep_whole(self, whole: torch.Tensor, factor: torch.Tensor) -> None:
        """Keep a layer's output as long as its factor is this one."""
        self.plain, self.whole, self.factor, self.unchanged = None, whole, factor, version(whole)

    def whole_for(self, factor: torch.Tensor) -> torch.Tensor | None:
        """The layer's output with this factor, if it is kept and nobody wrote into it."""
        if self.whole is None or self.factor is not factor or version(self.whole) != self.unchanged:
            return None
        return self.whole


class KeptTexts:
    """The products of the last texts that the denoiser was called with, until the call of the pipeline ends."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, int, dict[Any, TextProducts]]] = []  # with the version of each text
        self._now: torch.Tensor | None = None

    def begin(self, text: torch.Tensor) -> None:
        """The denoiser is called with a text [B, S, C] in a call of a pipeline."""
        self._now = None
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or text.is_inference():  # changes would not be seen
            return
        if len(text) > MOST_ROWS:
            return
        found = next((each for each in self._kept if each[0] is text and each[1] == text._version), None)
        others = [each for each in self._kept if each[0] is not text]
        self._kept = [*others[1 - MOST_TEXTS :], found or (text, text._version, {})]
        self._now = text

    def of(self, x: torch.Tensor) -> dict[Any, TextProducts] | None:
        """Layer -> what it made of `x`, if that is the text of this call of the denoiser."""
        return self._kept[-1][2] if not torch.compiler.is_compiling() and x is self._now else None

    def end(self) -> None:
        """The call of the pipeline has ended."""
        self._kept, self._now = [], None
