"""Recognise tensors that have not changed, so that what follows from them is not computed again at every step."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; 0 for inference tensors, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


class LastTensor:
    """The last tensor that was given.

    Attributes:
        number: counts tensors. An inference tensor always counts as another, since its changes are not visible.
    """

    def __init__(self) -> None:
        self.number = 0
        self._tensor: Callable[[], torch.Tensor | None] = lambda: None
        self._version = 0

    def is_it(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is the last one, unchanged since then."""
        return self._tensor() is tensor and self._version == version(tensor) and not tensor.is_inference()

    def is_again(self, tensor: torch.Tensor) -> bool:
        """The same. If it is another one, it is the last one from now on."""
        if self.is_it(tensor):
            return True
        self._tensor, self._version, self.number = weakref.ref(tensor), version(tensor), self.number + 1
        return False


class Derived:
    """What was computed from parameters last time, kept as long as these are the same and unchanged.

    With gradients, and in compiled code, it is computed anew. (A change through `parameter.data` cannot be noticed.)
    """

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._parameters: list[weakref.ref[torch.Tensor]] = []
        self._value: torch.Tensor | None = None

    def get(self, compute: Callable[[], torch.Tensor], *parameters: torch.Tensor, rows: int = 0) -> torch.Tensor:
        """`compute()` of the parameters, and of a number of rows if it depends on that."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return compute()
        key = rows, *((p.data_ptr(), p._version, p.device, p.dtype) for p in parameters)
        same = key == self._key and all(ref() is p for ref, p in zip(self._parameters, parameters, strict=True))
        if self._value is None or not same:
            self._key, self._parameters, self._value = key, [weakref.ref(p) for p in parameters], compute()
        return self._value

    def __reduce__(self) -> tuple:
        return type(self), ()  # a copy has parameters of its own
