"""Run calls of a pipeline inside a context of its mixture. The pipeline's class gets a `__call__` that looks at the
object.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, WeakSet, finalize

from mole_diffusers.patching.pipeline_lock import running
from mole_diffusers.patching.undo import Undo

Around = Callable[[Mapping[str, Any]], AbstractContextManager[None]]  # a call's arguments -> its context
Call = Callable[..., Any]

_around: WeakKeyDictionary[Any, WeakMethod] = WeakKeyDictionary()  # pipeline -> the context of its calls
_shared: WeakKeyDictionary[Any, WeakMethod] = WeakKeyDictionary()  # the same, for those that are not in `_around`
_patched: dict[type, tuple[Call, bool]] = {}  # class -> our __call__, and whether it defined one itself
_ours: WeakSet[Call] = WeakSet()  # each __call__ of ours: what replaced one for a while may have put it back
_begun: list[Any] = []  # frames of calls that began before their class was patched, so that their pipelines are unknown
_patching = threading.RLock()


def lock_calls(pipe: Any, around: Around, undo: Undo) -> None:
    """Make every call of `pipe` run inside `around(arguments)`, a method that holds a lock.

    Python looks up `__call__` on the class. So while one of a class's pipelines has a mixture, the class gets a
    `__call__` that looks at the object. Calls could not overlap without a mixture either, since a scheduler holds the
    state of one call.

    Returns once running calls of other threads are over.
    """
    undo.callback(unlock_calls, pipe)
    kind, me = type(pipe), threading.get_ident()
    collected = finalize(pipe, _give_back, kind)  # in case the pipeline is never detached
    collected.atexit = False
    undo.callback(collected.detach)
    _register(_around, pipe, around)
    code = _code(kind)
    while any(called is pipe and thread != me for thread, called in list(running)) or any(
        frame in _begun and frame.f_code is code for frame in _frames_of_others()
    ):
        time.sleep(0.02)


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
    frames, code = list(_frames_of_others()), _code(kind)
    _begun[:] = [frame for frame in frames if frame in _begun or frame.f_code is code]


def _asking(found: Call) -> Call:
    names = list(inspect.signature(found).parameters)[1:]

    @functools.wraps(found)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = _around.get(self) or _shared.get(self)
        around = None if method is None else method()
        with nullcontext() if around is None else around({**dict(zip(names, args, strict=False)), **kwargs}):
            running.append(entry := (threading.get_ident(), self))
            try:
                return found(self, *args, **kwargs)
            finally:
                running.remove(entry)

    _ours.add(call)
    return call


def _reaches(call: Any, ours: Call) -> bool:
    """Whether `call` is `ours`, or wraps it."""
    while call is not None and call is not ours:
        call = getattr(call, "__wrapped__", None)
    return call is ours


def _code(kind: type) -> Any:
    """The code of the class's own `__call__`."""
    return getattr(inspect.unwrap(kind.__call__), "__code__", None)


def _frames_of_others() -> Iterator[Any]:
    """The frames of the other threads. Their `f_locals` must not be read, which is not safe while they run."""
    for thread, frame in _current_frames().items():
        while frame is not None and thread != threading.get_ident():
            yield frame
            frame = frame.f_back  # type: ignore[assignment]


def _current_frames() -> dict[int, Any]:
    """`sys._current_frames()`, in which no garbage may be collected: in Python 3.11 that can stop the process for ever, see
    github.com/python/cpython/issues/106883.
    """
    with _patching:  # so that no two threads of ours turn collecting off and on
        collects = gc.isenabled()
        try:
            gc.disable()
            return sys._current_frames()
        finally:
            if collects:
                gc.enable()
