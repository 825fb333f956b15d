"""Undo changes: each step is recorded before its change, and the last one runs first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Undo:
    """The steps that restore what was changed.

    A step that fails stays, together with those after it, for another `close`. So each step must do no harm if it runs
    twice.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def callback(self, step: Callable[..., object], *args: Any) -> None:
        """Run `step(*args)` on `close`, before the steps that were recorded earlier."""
        self._steps.append(partial(step, *args))

    def override(self, owner: Any, name: str, value: Any) -> None:
        """Give one object its own value for an attribute or a method until `close`."""
        own = vars(owner)
        if name in own:  # set by someone else before us
            self.callback(own.__setitem__, name, own[name])
        else:
            self.callback(own.pop, name, None)
        own[name] = value

    def before_forward(self, module: nn.Module, hook: Callable[..., Any], **how: bool) -> None:
        """Call `hook` before each forward of `module` until `close`; `with_kwargs` and `prepend` are PyTorch's."""
        self.hook(module.register_forward_pre_hook, hook, **how)

    def after_forward(self, module: nn.Module, hook: Callable[..., Any], *, always_call: bool = False) -> None:
        """Call `hook` after each forward of `module` until `close`; `always_call`: also after one that raised."""
        self.hook(module.register_forward_hook, hook, always_call=always_call)

    def hook(self, register: Callable[..., RemovableHandle], hook: Callable[..., Any], **how: bool) -> None:
        """Register a hook by one of PyTorch's methods until `close`."""
        handles: list[RemovableHandle] = []  # the hook is removed even if an interruption comes right after it is there
        self.callback(lambda: list(map(RemovableHandle.remove, handles)))
        handles.append(register(hook, **how))

    def close(self) -> None:
        """Run the steps. If one is interrupted, for example by Ctrl-C, it and the rest run again before that is raised."""
        try:
            self._run()
        except BaseException:
            self._run()
            raise

    def _run(self) -> None:
        while self._steps:
            self._steps[-1]()
            del self._steps[-1]


def restore_point(owner: Any, *names: str) -> Callable[[Undo], None]:
    """A function that gives `owner` the values that these attributes have now, until it is undone."""
    values = {name: vars(owner)[name] for name in names}

    def restore(undo: Undo) -> None:
        for name, value in values.items():
            undo.override(owner, name, value)

    return restore


@contextmanager
def undoing() -> Iterator[Undo]:
    """Steps that run when the block ends, also if that is interrupted before the first of them."""
    undo = Undo()
    try:
        yield undo
    finally:
        try:
            undo.close()
        except BaseException:
            undo.close()
            raise
