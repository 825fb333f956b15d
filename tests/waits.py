"""What would make a CPU wait for a card, counted without one."""

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

from benchmarks.steps import Operations


class Waits(TorchFunctionMode):
    """Counts what would wait for a card: values that are read, and numbers that are copied there in turn with its work."""

    def __init__(self):
        super().__init__()
        self.count, self.made = 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, out = kwargs or {}, None
        out = func(*args, **kwargs)
        if func is torch.tensor:
            self.made.append(out)
        moved = func is torch.Tensor.to and not kwargs.get("non_blocking") and any(args[0] is own for own in self.made)
        self.count += moved or func in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist)
        return out


def waits_of_a_step(draw: Callable[[int], object]) -> int:
    """How often two steps wait, of `draw(steps)`, when all that is made in the first steps has been made."""

    def waits(steps):
        with Waits() as waits, Operations() as operations:
            draw(steps)
        return waits.count + operations.reads

    return waits(6) - waits(4)
