"""Keys and values of the text, kept while a call of the pipeline runs: cross-attention reads the same text in each step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from mole_diffusers.gates.unchanged import LastTensor, version

MOST_ROWS = 4  # of a text: for two pictures with guidance. In half precision, two rows take 8 MB in SD 1.5, 51 MB in SDXL


class OfText:
    """What one layer makes of the text.

    Attributes:
        weights: the versions of its weights.
        low: A x, [B T, R].
        plain: W x, [B T, Cout], if the factor of A x is another one in each step, as with gates that read the picture.
    """

    def __init__(self, weights: tuple[int, ...], low: torch.Tensor):
        self.weights, self.low = weights, low
        self.plain: torch.Tensor | None = None
        self._factor: Callable[[], torch.Tensor | None] = lambda: None
        self._output: torch.Tensor | None = None
        self._version = 0

    def output(self, factor: torch.Tensor) -> torch.Tensor | None:
        """The layer's output with this factor, [B, T, Cout], if it is kept, and no processor of attention wrote into it."""
        output = self._output
        return output if output is not None and factor is self._factor() and version(output) == self._version else None

    def keep(self, output: torch.Tensor, factor: torch.Tensor, plain: torch.Tensor) -> None:
        """Keep the output if its factor is that of the last step, otherwise W x."""
        if factor is self._factor():
            self.plain, self._output, self._version = None, output, version(output)
        else:
            self.plain, self._output, self._factor = plain, None, weakref.ref(factor)


class KeptText:
    """What layers make of a text that comes again in the next call of the denoiser, until another one comes."""

    def __init__(self) -> None:
        self._last = LastTensor()
        self._text: torch.Tensor | None = None
        self._made: dict[Any, OfText] = {}

    def begin(self, text: torch.Tensor, *, in_call: bool) -> None:
        """The denoiser is called with a text [B, S, C], in a call of a pipeline or outside of one."""
        is_again = self._last.is_again(text)
        counts_changes = not (torch.is_grad_enabled() or torch.is_inference_mode_enabled())
        if is_again and in_call and counts_changes and len(text) <= MOST_ROWS:
            self._text = text
        else:
            self.end()

    def of(self, x: torch.Tensor) -> dict[Any, OfText] | None:
        """Layer -> what it makes of `x`, if that is the text that came again."""
        return self._made if not torch.compiler.is_compiling() and x is self._text else None

    def end(self) -> None:
        """The call of the pipeline has ended."""
        self._text, self._made = None, {}
