"""One lock for a denoiser and its pipelines: threads wait for one another, and get an error if they would wait for ever."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

OTHER_TASK = (
    "another task of this thread is inside a `with` block of this mixture, or draws with it; such a block must not wait "
    "for anything (`await`): run it in a thread, as with asyncio.to_thread"
)
ENDED = "a `with` block of this mixture was opened on a thread that has ended; close it first"
MOVED = (
    "a `with` block of this mixture was entered at {at} on thread {thread!r}, and the generator that holds it goes on "
    "on another; run such a generator on one thread"
)
WAITING = (
    "waiting for {seconds:.0f} s for the `with` block that thread {thread!r} entered at {at}; if that block waits for "
    "this thread, as by `future.result()`, neither will ever end"
)
LOOK_EVERY = 0.5  # seconds between looks at whom one waits for
WARN_AFTER = 10.0  # seconds of waiting for a block that draws nothing

OWN = (f"{Path(__file__).parents[1]}{os.sep}", contextlib.__file__)  # files whose frames are not a user's
SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

_locks: WeakKeyDictionary[Any, PipelineLock] = WeakKeyDictionary()  # denoiser -> its lock
_making = threading.RLock()
running: list[tuple[int, Any]] = []  # (thread, pipeline) of each known call


class PipelineLock:
    """A lock that one thread, or one task of it, may hold any number of times, and that any thread may release.

    A generator may be closed on another thread than the one that opened it; its block ends there. A process that was
    forked while another thread held the lock gets an error instead of waiting for a thread that it does not have.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: tuple[threading.Thread, Any] | None = None
        self._open: list[ref[_Block]] = []  # blocks, the outermost first

    @contextmanager
    def held(self, *, around: bool = False, draws: bool = False) -> Iterator[None]:
        """Keep others out while this block runs, and while other blocks of the same holder do.

        Args:
            around: whether a user's own code runs inside. Whoever waits long for it is told where it was entered.
            draws: whether a picture is drawn inside. That may take long, so nobody who waits is told.

        Raises RuntimeError if waiting would never end: for another task of this thread, for a thread that ended, or for
        a block of the very generator that waits.
        """
        me, block = (threading.current_thread(), _task()), _Block(sys._getframe(1), around, draws)
        thread, task = self._holder or (None, None)
        if not (thread is me[0] and task in (None, me[1])):
            self._acquire(me[0])
            self._holder = me
        self._open.append(opened := ref(block))
        try:
            yield
        finally:
            self._open.remove(opened)
            if not self._open:
                self._holder = None
                self._lock.release()

    def _acquire(self, me: threading.Thread) -> None:
        since, outermost = time.monotonic(), self._open[:1]
        while not self._lock.acquire(timeout=LOOK_EVERY):
            thread, _ = self._holder or (None, None)
            if thread is None:
                continue
            if thread is me:
                raise RuntimeError(OTHER_TASK)
            blocks = [block for opened in list(self._open) if (block := opened()) is not None]
            mine = set(_callers(sys._getframe(1)))  # without this frame, which would hold itself and all their objects
            if moved := next((block for block in blocks if mine & block.generators), None):
                raise RuntimeError(MOVED.format(at=moved.entered_at, thread=thread.name))
            if not thread.is_alive():
                raise RuntimeError(ENDED)
            around = next((block for block in blocks if block.around), None)
            draws = _calls(thread) or any(block.draws for block in blocks)
            if around is None or draws or outermost != self._open[:1]:
                since, outermost = time.monotonic(), self._open[:1]
            elif (waited := time.monotonic() - since) > WARN_AFTER:
                warnings.warn(WAITING.format(seconds=waited, thread=thread.name, at=around.entered_at), stacklevel=4)
                since = float("inf")  # warn only once


class _Block:
    """A block that holds a lock.

    `held` keeps it, and the lock only has a weak reference. So a block that is no longer referenced is collected, which
    ends it.

    Attributes:
        entered_at: where it was entered, outside of this package.
        generators: frames of the generators and coroutines that ran then. Each may be suspended, with the block open,
            and continue on another thread.
        around: whether a user's code runs inside.
        draws: whether a picture is drawn inside.
    """

    def __init__(self, frame: Any, around: bool, draws: bool):
        callers = [f for f in _callers(frame) if not f.f_code.co_filename.startswith(OWN)]
        self.entered_at = next((f"{f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}" for f in callers), "?")
        self.generators = {f for f in callers if f.f_code.co_flags & SUSPENDABLE}
        self.around, self.draws = around, draws


def _callers(frame: Any) -> list[Any]:
    """A frame of this thread, and the frames that called it."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _calls(thread: threading.Thread) -> bool:
    """Whether a call of a pipeline runs on a thread."""
    return any(caller == thread.ident for caller, _ in list(running))


def lock_of(denoiser: Any) -> PipelineLock:
    """The lock of a denoiser, always the same one."""
    with _making:
        return _locks.setdefault(denoiser, PipelineLock())


def _task() -> Any:
    """The running asyncio task, if any."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
