"""Recognise a tensor that was seen last time, so that results for a text are not computed again at every step."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; 0 for inference tensors, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


class Seen:
    """Remembers the last tensor. An inference tensor always counts as new, since its changes are not visible."""

    def __init__(self) -> None:
        self._last: Callable[[], torch.Tensor | None] = lambda: None
        self._version = 0

    def again(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is the same as in the last call, unchanged since then."""
        same = self._last() is tensor and self._version == version(tensor) and not tensor.is_inference()
        if not same:
            self._last, self._version = weakref.ref(tensor), version(tensor)
        return same
