"""Hooks around the forward of a module: small named classes, as diffusers' `ModelHook` is.

They are registered with PyTorch, not in a `HookRegistry` of diffusers. That one stays on a module when its hooks are
removed, with a `forward` of its own, so the model would not be as it was; and it calls no hook after a forward that raised.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Any

from torch import nn

from mole_diffusers.patching.undo import Undo

Call = tuple[tuple, dict[str, Any]]  # the arguments of a forward


class ForwardHook(ABC):
    """Something that happens before each forward of a module."""

    def register(self, module: nn.Module, undo: Undo) -> None:
        """Put this hook on a module until `undo` closes."""
        undo.before_forward(module, self.before, with_kwargs=True)

    @abstractmethod
    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """Called before the forward; may return other arguments for it."""


class Entered(threading.local):
    """What each thread has entered around modules that run."""

    def __init__(self) -> None:
        self.stacks: list[ExitStack] = []

    def leave(self) -> None:
        """Leave what an interrupted call of this thread has entered: PyTorch calls no hook after a Ctrl-C."""
        while self.stacks:
            self.stacks.pop().close()


class AroundForward(ForwardHook):
    """Contexts that are entered before each forward of a module and end with it."""

    def __init__(self, entered: Entered):
        self.entered = entered

    def register(self, module: nn.Module, undo: Undo) -> None:
        undo.callback(self.entered.leave)
        super().register(module, undo)
        undo.after_forward(module, self.after, always_call=True)

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.entered.stacks.append(ExitStack())
        self.enter(module, self.entered.stacks[-1])

    def after(self, *_: object) -> None:
        """Called after the forward, also after one that raised."""
        self.entered.stacks.pop().close()

    @abstractmethod
    def enter(self, module: Any, stack: ExitStack) -> None:
        """Enter contexts in `stack`."""
