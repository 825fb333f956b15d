"""One re-entrant lock for a denoiser and its pipelines: threads wait for one another."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

OTHER_TASK = (
    "another task of this thread is inside a `with` block of this mixture, or draws with it; such a block must not wait "
    "for anything (`await`): run it in a thread, as with asyncio.to_thread"
)
ENDED = "a `with` block of this mixture was opened on a thread that has ended; close it first"
WAITING = (
    "waiting for {seconds:.0f} s for a `with` block of thread {thread!r}; if that block waits for this thread, as by "
    "`future.result()`, or belongs to a generator that goes on here, neither will ever end"
)
WARN_AFTER = 10.0  # seconds of waiting for a block that draws nothing

_locks: WeakKeyDictionary[Any, PipelineLock] = WeakKeyDictionary()  # denoiser -> its lock
_making = threading.RLock()


@dataclass(frozen=True, eq=False)
class _Block:
    """A block that holds a lock, or waits for it."""

    thread: threading.Thread
    task: Any  # that of asyncio which entered it, if any
    draws: bool  # whether a picture is drawn inside

    def admits(self, other: _Block) -> bool:
        """Whether another block may be entered inside this one."""
        return self.thread is other.thread and self.task in (None, other.task)

    def refuse_endless_wait(self, other: _Block) -> None:
        """Raise RuntimeError if another block would wait for this one for ever."""
        if self.thread is other.thread:
            raise RuntimeError(OTHER_TASK)
        if not self.thread.is_alive():
            raise RuntimeError(ENDED)


class PipelineLock:
    """A lock that one thread, or one task of it, may hold any number of times, and that any thread may release.

    A generator may be closed on another thread than the one that opened it; its block ends there. A process that was
    forked while another thread held the lock gets an error instead of waiting for a thread that it does not have.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[_Block] = []  # those of the holder, the outermost first
        self._joining = threading.RLock()  # held to change `_open` while it has blocks: any thread may close one

    @property
    def is_mine(self) -> bool:
        """Whether this thread, or this task of it, holds it."""
        block = _Block(threading.current_thread(), _task(), False)
        return any(opened.admits(block) for opened in self._open[:1])

    @contextmanager
    def held(self, *, draws: bool = False) -> Iterator[None]:
        """Keep others out while this block runs, and while other blocks of the same holder do.

        Args:
            draws: whether a picture is drawn inside. Others wait for that without a warning, however long it takes.

        Raises RuntimeError if waiting would never end: for another task of this thread, or for a thread that has ended.
        """
        block = _Block(threading.current_thread(), _task(), draws)
        with self._joining:
            if joins := self.is_mine:
                self._open.append(block)
        if not joins:
            if not self._lock.acquire(blocking=False):
                outermost = self._open[:1]
                for opened in list(self._open):
                    opened.refuse_endless_wait(block)
                if not self._lock.acquire(timeout=WARN_AFTER):
                    if outermost and outermost == self._open[:1] and not any(opened.draws for opened in self._open):
                        about = WAITING.format(seconds=WARN_AFTER, thread=outermost[0].thread.name)
                        warnings.warn(about, stacklevel=3)
                    self._lock.acquire()
            self._open.append(block)
        try:
            yield
        finally:
            with self._joining:
                self._open.remove(block)
                if not self._open:
                    self._lock.release()


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
