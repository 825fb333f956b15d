"""One lock for a pipeline: its calls wait for one another, whatever threads they come from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from threading import RLock
from typing import Any


def lock_calls(pipe: Any, during: Callable[[], AbstractContextManager[None]], undo: ExitStack) -> None:
    """Have every call of `pipe` run inside `during()`, which holds a lock.

    A call is looked up on the type, so the object gets a type of its own.

    A scheduler holds the state of one call, so calls of one pipeline could not overlap without a mixture either.
    """
    found = type(pipe)

    @functools.wraps(found.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with during():
            return found.__call__(self, *args, **kwargs)

    names = ("__module__", "__qualname__", "__doc__")
    undo.callback(object.__setattr__, pipe, "__class__", found)
    alike = type(found.__name__, (found,), {"__call__": call, **{name: getattr(found, name) for name in names}})
    object.__setattr__(pipe, "__class__", alike)


class PipelineLock:
    """A lock that one thread may take any number of times; a copy of a model that refers to it gets its own."""

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, _: dict) -> PipelineLock:
        return PipelineLock()
