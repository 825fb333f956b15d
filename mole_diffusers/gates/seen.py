"""Whether a tensor is the one that was seen last: what follows from a text need not be worked out at every step."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; tensors of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


class Seen:
    """The tensor that was seen last. One of inference mode is always another, since its changes do not show."""

    def __init__(self) -> None:
        self._last: Callable[[], torch.Tensor | None] = lambda: None
        self._version = 0

    def again(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is the one that was given last, and has not changed since."""
        same = self._last() is tensor and self._version == version(tensor) and not tensor.is_inference()
        if not same:
            self._last, self._version = weakref.ref(tensor), version(tensor)
        return same
