"""Hooks around the forward of a module: small named classes, as diffusers' `ModelHook` is.

They are registered with PyTorch, not in a `HookRegistry` of diffusers. That one stays on a module when its hooks are
removed, with a `forward` of its own, so the model would not be as it was; and it calls no hook after a forward that raised.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mole_diffusers.patching.undo import Undo, undoing

ForwardInput = tuple[tuple, dict[str, Any]]  # the arguments of a forward


class ForwardHook(ABC):
    """Something that happens before each forward of a module."""

    def register(self, module: nn.Module, undo: Undo) -> None:
        """Put this hook on a module until `undo` closes."""
        undo.before_forward(module, self.before, with_kwargs=True)

    @abstractmethod
    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> ForwardInput | None:
        """Called before the forward; may return other arguments for it."""


class EnteredContexts(threading.local):
    """What each thread has entered around modules that run."""

    def __init__(self) -> None:
        self.stacks: list[ExitStack] = []

    def leave(self) -> None:
        """Leave what an interrupted call of this thread has entered: PyTorch calls no hook after a Ctrl-C."""
        while self.stacks:
            self.stacks.pop().close()


class AroundForward(ForwardHook):
    """Contexts that are entered before each forward of a module and end with it."""

    def __init__(self, entered: EnteredContexts):
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


class Uncompiled(AroundForward):
    """On a model: runs blocks that were compiled one by one uncompiled, in the calls that begin while `needed()` is true.

    Hooks do something there that compiled code leaves out.
    """

    def __init__(self, entered: EnteredContexts, blocks: Sequence[nn.Module], needed: Callable[[], bool]):
        super().__init__(entered)
        self.blocks, self.needed = blocks, needed

    def enter(self, module: Any, stack: ExitStack) -> None:
        if torch.compiler.is_compiling() or not self.needed():
            return
        for block in self.blocks:
            if (call := getattr(block, "_compiled_call_impl", None)) is not None:
                stack.callback(setattr, block, "_compiled_call_impl", call)
                block._compiled_call_impl = None


@contextmanager
def replaced_forward(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, calls of `module` go to `run`, after its hooks. Calls that `run` itself makes go to the module,
    with its hooks.
    """
    found, inside = module.forward, False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return found(*args, **kwargs)
        inside = True
        try:
            return run(*args, **kwargs)
        finally:
            inside = False

    with undoing() as undo:
        undo.override(module, "forward", forward)
        yield
