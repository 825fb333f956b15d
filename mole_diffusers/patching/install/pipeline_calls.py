"""Run calls of a pipeline inside a context of its mixture. The pipeline's class gets a `__call__` that looks at the
object.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, WeakSet, finalize

from mole_diffusers.patching.undo import Undo

Around = Callable[[Mapping[str, Any]], AbstractContextManager[None]]  # a call's arguments -> its context
Call = Callable[..., Any]

_around: WeakKeyDictionary[Any, WeakMethod] = WeakKeyDictionary()  # pipeline -> the context of its calls
_shared: WeakKeyDictionary[Any, WeakMethod] = WeakKeyDictionary()  # the same, for those that are not in `_around`
_patched: dict[type, tuple[Call, bool]] = {}  # class -> our __call__, and whether it defined one itself
_ours: WeakSet[Call] = WeakSet()  # each __call__ of ours: what replaced one for a while may have put it back
_patching = threading.RLock()


def lock_calls(pipe: Any, around: Around, undo: Undo) -> None:
    """Make every call of `pipe` run inside `around(arguments)`, a method that holds a lock.

    Python looks up `__call__` on the class. So while one of a class's pipelines has a mixture, the class gets a
    `__call__` that looks at the object. Calls could not overlap without a mixture either, since a scheduler holds the
    state of one call. A call that another thread began before the first mixture came is not waited for.
    """
    undo.callback(unlock_calls, pipe)
    collected = finalize(pipe, _give_back, type(pipe))  # in case the pipeline is never detached
    collected.atexit = False
    undo.callback(collected.detach)
    _register(_around, pipe, around)


def share_calls(pipe: Any, around: Around) -> None:
    """Like `lock_calls`, for as long as the pipeline lives and has no lock of its own."""
    finalize(pipe, _give_back, type(pipe)).atexit = False
    _register(_shared, pipe, around)


def _register(known: WeakKeyDictionary[Any, WeakMethod], pipe: Any, around: Around) -> None:
    kind = type(pipe)
    with _patching:
        known[pipe] = WeakMethod(around)
        if kind not in _patched or not _reaches(kind.__call__, _patched[kind][0]):
            _patch(kind)


def calls_are_locked(pipe: Any) -> bool:
    """Whether calls of `pipe` run inside a context."""
    return pipe in _around


def unlock_calls(pipe: Any) -> None:
    """Restore the class's own `__call__`, if none of its other pipelines has a mixture."""
    with _patching:
        _around.pop(pipe, None)
        _give_back(type(pipe))


def _give_back(kind: Any) -> None:
    with _patching:
        ours, had_own = _patched.get(kind, (None, False))
        if ours is None or any(type(pipe) is kind for pipe in [*_around, *_shared]):
            return
        # If someone has wrapped ours since, it stays inside theirs and does nothing.
        if vars(kind).get("__call__") is ours:
            if had_own:
                kind.__call__ = ours.__wrapped__  # type: ignore[attr-defined]
            else:
                del kind.__call__
            _patched.pop(kind, None)


def _patch(kind: Any) -> None:
    found: Any = kind.__call__
    while found in _ours:  # of a class that this one inherits from, or of before
        found = found.__wrapped__
    _patched[kind] = _asking(found), "__call__" in vars(kind)
    kind.__call__ = _patched[kind][0]


def _asking(found: Call) -> Call:
    names = list(inspect.signature(found).parameters)[1:]

    @functools.wraps(found)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = _around.get(self) or _shared.get(self)
        around = None if method is None else method()
        with nullcontext() if around is None else around({**dict(zip(names, args, strict=False)), **kwargs}):
            return found(self, *args, **kwargs)

    _ours.add(call)
    return call


def _reaches(call: Any, ours: Call) -> bool:
    """Whether `call` is `ours`, or wraps it."""
    while call is not None and call is not ours:
        call = getattr(call, "__wrapped__", None)
    return call is ours
