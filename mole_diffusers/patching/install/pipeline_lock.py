"""One re-entrant lock for a denoiser and its pipelines: threads wait for one another."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

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
WARN_AFTER = 10.0  # seconds of waiting for a block that draws nothing

OWN = (f"{Path(__file__).parents[2]}{os.sep}", contextlib.__file__)  # files whose frames are not a user's
SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

_locks: WeakKeyDictionary[Any, PipelineLock] = WeakKeyDictionary()  # denoiser -> its lock
_making = threading.RLock()


class PipelineLock:
    """A lock that one thread, or one task of it, may hold any number of times, and that any thread may release.

    A generator may be closed on another thread than the one that opened it; its block ends there. A process that was
    forked while another thread held the lock gets an error instead of waiting for a thread that it does not have.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[_Block] = []  # those of the holder, the outermost first
        self._joining = threading.RLock()  # held to change `_open` while it has blocks: any thread may close one

    @contextmanager
    def held(self, *, draws: bool = False) -> Iterator[None]:
        """Keep others out while this block runs, and while other blocks of the same holder do.

        Args:
            draws: whether a picture is drawn inside. Others wait for that without a warning, however long it takes.

        Raises RuntimeError if waiting would never end: for another task of this thread, for a thread that has ended, or
        for a block of the very generator that waits.
        """
        block = _Block(draws)
        with self._joining:
            if joins := any(opened.admits(block) for opened in self._open[:1]):
                self._open.append(block)
        if not joins:
            if not self._lock.acquire(blocking=False):
                outermost = self._open[:1]
                for opened in list(self._open):
                    opened.refuse_endless_wait(block)
                if not self._lock.acquire(timeout=WARN_AFTER):
                    if outermost and outermost == self._open[:1] and not any(opened.draws for opened in self._open):
                        about = {"thread": outermost[0].thread.name, "at": outermost[0].entered_at}
                        warnings.warn(WAITING.format(seconds=WARN_AFTER, **about), stacklevel=3)
                    self._lock.acquire()
            self._open.append(block)
        try:
            yield
        finally:
            with self._joining:
                self._open.remove(block)
                if not self._open:
                    self._lock.release()


class _Block:
    """A block that holds a lock, or waits for it.

    Attributes:
        thread, task: what entered it; the task is that of asyncio, if any.
        draws: whether a picture is drawn inside.
        entered_at: where it was entered, outside of this package.
        callers: ids of the frames that were running then.
        generators: those of generators and coroutines among them. Each may be suspended, with the block open, and continue
            on another thread. (Frames themselves would keep a dropped generator, and so its block, alive.)
    """

    def __init__(self, draws: bool):
        self.thread, self.task, self.draws = threading.current_thread(), _task(), draws
        frames = list(_users_frames())
        self.entered_at = next((f"{f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}" for f in frames), "?")
        self.callers = {id(frame) for frame in frames}
        self.generators = {id(frame) for frame in frames if frame.f_code.co_flags & SUSPENDABLE}

    def admits(self, other: _Block) -> bool:
        """Whether another block may be entered inside this one."""
        return self.thread is other.thread and self.task in (None, other.task)

    def refuse_endless_wait(self, other: _Block) -> None:
        """Raise RuntimeError if another block would wait for this one for ever."""
        if self.thread is other.thread:
            raise RuntimeError(OTHER_TASK)
        if self.generators & other.callers:
            raise RuntimeError(MOVED.format(at=self.entered_at, thread=self.thread.name))
        if not self.thread.is_alive():
            raise RuntimeError(ENDED)


def _users_frames() -> Iterator[FrameType]:
    """The frames that called this package, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(OWN):
            yield frame
        frame = frame.f_back


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
