"""One lock for a pipeline: its calls wait for one another, whatever threads they come from."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

from mole_diffusers.patching.undo import Undo

Around = Callable[[], AbstractContextManager[None]]  # the context that a call runs in

OTHER_TASK = (
    "another task of this thread is inside a `with` block of this mixture, or draws with it; such a block must not wait "
    "for anything (`await`): run it in a thread, as with asyncio.to_thread"
)
ENDED = "a `with` block of this mixture was opened on a thread that has ended; close it first"

_around: WeakKeyDictionary[Any, WeakMethod] = WeakKeyDictionary()  # pipeline -> what its calls run in
_patched: dict[type, tuple[Callable[..., Any], bool]] = {}  # class -> our __call__, whether it had one of its own
_running: list[tuple[int, Any]] = []  # (thread, pipeline) of each call of these classes
_patching = threading.RLock()


def lock_calls(pipe: Any, around: Around, undo: Undo) -> None:
    """Have every call of `pipe` run inside `around()`, a method that holds a lock.

    Python looks a call up on the class. So the class gets a `__call__` that asks which object is called, while one of its
    pipelines has a mixture. A scheduler holds the state of one call, so calls could not overlap without a mixture either.

    Returns once the calls of other threads that had begun are over.
    """
    undo.callback(unlock_calls, pipe)
    with _patching:
        _around[pipe] = WeakMethod(around)
        kind, begun = type(pipe), []
        if kind not in _patched:
            found: Any = kind.__call__
            while any(found is ours for ours, _ in _patched.values()):  # of a class that this one inherits from
                found = found.__wrapped__
            _patched[kind] = _asking(found), "__call__" in vars(kind)
            kind.__call__ = _patched[kind][0]
            code = getattr(inspect.unwrap(found), "__code__", None)
            begun = [frame for frame in _frames_of_others() if frame.f_code is code]  # whose pipelines nobody noted
    me = threading.get_ident()
    while any(running is pipe and thread != me for thread, running in list(_running)) or (
        begun and any(frame in begun for frame in _frames_of_others())
    ):
        time.sleep(0.02)


def unlock_calls(pipe: Any) -> None:
    """Give back the class's own `__call__`, where no other of its pipelines has a mixture."""
    with _patching:
        _around.pop(pipe, None)
        kind = type(pipe)
        ours, had_own = _patched.get(kind, (None, False))
        # Where someone has wrapped ours since, it stays inside theirs and does nothing.
        if ours is not None and vars(kind).get("__call__") is ours and not any(type(p) is kind for p in list(_around)):
            if had_own:
                kind.__call__ = ours.__wrapped__  # type: ignore[attr-defined]
            else:
                del kind.__call__
            del _patched[kind]


def _asking(found: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(found)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = _around.get(self)
        around = None if method is None else method()
        with nullcontext() if around is None else around():
            _running.append(entry := (threading.get_ident(), self))
            try:
                return found(self, *args, **kwargs)
            finally:
                _running.remove(entry)

    return call


def _frames_of_others() -> Iterator[Any]:
    """The frames of the other threads. Their `f_locals` must not be read: that is not safe while they run."""
    for thread, frame in sys._current_frames().items():
        while frame is not None and thread != threading.get_ident():
            yield frame
            frame = frame.f_back  # type: ignore[assignment]


class PipelineLock:
    """A lock that one thread, or one task of it, may hold any number of times, and that any thread may let go.

    A generator may be closed on another thread than it was opened on: its block ends there. A process that was forked
    while another thread held the lock meets an error, and never waits for a thread that it does not have.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: tuple[threading.Thread, Any] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others out while the block runs.

        Raises RuntimeError where waiting would never end: for another task of this thread, or for a thread that ended.
        """
        me = threading.current_thread(), _task()
        thread, task = self._holder or (None, None)
        if thread is me[0] and task in (None, me[1]):
            yield
            return
        while not self._lock.acquire(timeout=0.5):
            thread, _ = self._holder or (None, None)
            if thread is me[0]:
                raise RuntimeError(OTHER_TASK)
            if thread is not None and not thread.is_alive():
                raise RuntimeError(ENDED)
        try:
            self._holder = me
            yield
        finally:
            self._holder = None
            self._lock.release()


def _task() -> Any:
    """The task of asyncio that runs, if any."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
