"""What need not be computed twice: products of a text that stays the same, and one projection for layers with one input."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mole_diffusers.functional import version

Tensors = tuple[torch.Tensor, ...]


def at_rest() -> bool:
    """Whether tensors may be kept from one call to the next: no gradients are taken, no graph is traced, nothing is cast."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


class Kept:
    """What was last made of some tensors, for as long as they are the same objects with the same bits.

    It is made when they come for the second time, so that what comes once takes no memory. The tensors themselves are not
    kept alive. A change in place through `tensor.data` is one that PyTorch does not count, and is not seen.
    """

    def __init__(self) -> None:
        self._key: tuple[tuple[int, int], ...] | None = None
        self._given: list[weakref.ref] = []
        self._made: tuple[Tensors, list[int]] | None = None

    def of(self, given: Sequence[torch.Tensor | None], make: Callable[[], Tensors]) -> Tensors | None:
        """`make()`, or what it gave before; None at first sight, and for tensors whose changes cannot be seen."""
        there = [t for t in given if t is not None]
        if any(t.is_inference() for t in there):
            return None
        if not self._known(there):
            self._key, self._given, self._made = _key(there), [weakref.ref(t) for t in there], None
            return None
        made = self._whole()
        if made is None:
            made = make()
            self._made = made, [version(t) for t in made]
        return made

    def made(self, given: Sequence[torch.Tensor | None]) -> Tensors | None:
        """What it holds of `given`, if anything; nothing is made or forgotten."""
        there = [t for t in given if t is not None]
        return self._whole() if self._known(there) else None

    def _known(self, there: Sequence[torch.Tensor]) -> bool:
        return self._key == _key(there) and all(ref() is t for ref, t in zip(self._given, there, strict=True))

    def _whole(self) -> Tensors | None:
        """What was made, if nothing of it was changed since."""
        if self._made is None or [version(t) for t in self._made[0]] != self._made[1]:
            return None
        return self._made[0]


def _key(there: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((t.data_ptr(), version(t)) for t in there)


class Together:
    """Layers that read one input: the first that asks projects it for all of them, in one product.

    Their matrices lie one behind the other in one piece of memory. Where they do not any more, since they were moved one
    by one, each projects for itself.
    """

    def __init__(self, downs: Sequence[nn.Linear]):
        self.downs = list(downs)
        self._ranks = [down.weight.shape[0] for down in downs]
        self._of: weakref.ref | None = None
        self._version = 0
        self._lows: list[torch.Tensor | None] = []
        self._where: list[int] = []
        self._joined = False
        whole = torch.cat([down.weight.data for down in downs])  # [sum R, Cin]
        for down, part in zip(downs, whole.split(self._ranks), strict=True):
            down.weight.data = part

    def low(self, x: torch.Tensor, index: int) -> torch.Tensor | None:
        """A x of layer `index`, [B, T, R]; None where it has to make that itself."""
        if self._of is None or self._of() is not x or self._version != version(x) or self._lows[index] is None:
            whole = None if x.is_inference() else self._whole()
            if whole is None:
                return None
            self._of, self._version = weakref.ref(x), version(x)
            self._lows = list(F.linear(x, whole).split(self._ranks, -1))
        low, self._lows[index] = self._lows[index], None
        return low

    def _whole(self) -> torch.Tensor | None:
        """[sum R, Cin], the matrices as one; None where they lie apart."""
        weights = [down.weight for down in self.downs]
        where = [weight.data_ptr() for weight in weights]
        if where != self._where:
            self._where, self._joined = where, _one_behind_the_other(weights)
        width = weights[0].shape[1]
        return weights[0].detach().as_strided((sum(self._ranks), width), (width, 1)) if self._joined else None


def _one_behind_the_other(weights: Sequence[torch.Tensor]) -> bool:
    if len({(weight.dtype, weight.untyped_storage().data_ptr()) for weight in weights}) > 1:
        return False
    ends = [weight.data_ptr() + weight.numel() * weight.element_size() for weight in weights]
    return [weight.data_ptr() for weight in weights[1:]] == ends[:-1]
