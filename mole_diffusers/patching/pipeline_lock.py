"""One lock for a denoiser and the pipeline around it: calls wait for one another, whatever threads they come from."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, finalize, ref

from mole_diffusers.patching.undo import Undo

Around = Callable[[], AbstractContextManager[None]]  # the context that a call runs in
Call = Callable[..., Any]

OTHER_TASK = (
    "another task of this thread is inside a `with` block of this mixture, or draws with it; such a block must not wait "
    "for anything (`await`): run it in a thread, as with asyncio.to_thread"
)
ENDED = "a `with` block of this mixture was opened on a thread that has ended; close it first"
MOVED = (
    "a `with` block of this mixture was entered at {place} on thread {thread!r}, and the generator that holds it goes on "
    "on another; run such a generator on one thread"
)
WAITING = (
    "waiting for {seconds:.0f} s for the `with` block that thread {thread!r} entered at {place}; if that block waits for "
    "this thread, as by `future.result()`, neither will ever end"
)
WARN_AFTER = 10.0  # seconds of waiting for a block that draws nothing

OWN = (str(Path(__file__).parents[1]), contextlib.__file__)  # whose frames are not a user's
SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

_locks: WeakKeyDictionary[Any, PipelineLock] = WeakKeyDictionary()  # denoiser -> its lock
_around: WeakKeyDictionary[Any, WeakMethod] = WeakKeyDictionary()  # pipeline -> what its calls run in
_patched: dict[type, tuple[Call, bool]] = {}  # class -> our __call__, whether it had one of its own
_running: list[tuple[int, Any]] = []  # (thread, pipeline) of each call of these classes
_begun: list[Any] = []  # frames of calls that had begun before their class was patched, whose pipelines nobody noted
_patching = threading.RLock()


class PipelineLock:
    """A lock that one thread, or one task of it, may hold any number of times, and that any thread may let go.

    A generator may be closed on another thread than it was opened on: its block ends there. A process that was forked
    while another thread held the lock meets an error, and never waits for a thread that it does not have.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: tuple[threading.Thread, Any] | None = None
        self._open: list[ref[_Block]] = []  # blocks, the outermost first

    @contextmanager
    def held(self, *, around: bool = False) -> Iterator[None]:
        """Keep others out while the block runs, and as long as another block of the same holder does.

        Args:
            around: whether a user's own code runs inside: whoever waits long for it is told where it was entered.

        Raises RuntimeError where waiting would never end: for another task of this thread, for a thread that ended, or for
        a block of the very generator that waits.
        """
        me, block = (threading.current_thread(), _task()), _Block(sys._getframe(1), around)
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
        while not self._lock.acquire(timeout=0.5):
            thread, _ = self._holder or (None, None)
            if thread is None:
                continue
            if thread is me:
                raise RuntimeError(OTHER_TASK)
            blocks = [block for opened in list(self._open) if (block := opened()) is not None]
            mine = set(_callers(sys._getframe()))
            if moved := next((block for block in blocks if mine & block.generators), None):
                raise RuntimeError(MOVED.format(place=moved.place, thread=thread.name))
            if not thread.is_alive():
                raise RuntimeError(ENDED)
            around = next((block for block in blocks if block.around), None)
            if around is None or _calls(thread) or outermost != self._open[:1]:
                since, outermost = time.monotonic(), self._open[:1]
            elif (waited := time.monotonic() - since) > WARN_AFTER:
                warnings.warn(WAITING.format(seconds=waited, thread=thread.name, place=around.place), stacklevel=4)
                since = float("inf")  # once


class _Block:
    """A block that holds a lock.

    It is `held` that keeps it, and the lock knows it weakly: a block that everybody has dropped is collected, and so ends.

    Attributes:
        place: where it was entered, outside of this package.
        generators: frames of the generators and coroutines that ran then. Each may be suspended, with the block open, and go
            on on another thread.
        around: whether a user's code runs inside.
    """

    def __init__(self, frame: Any, around: bool):
        callers = [f for f in _callers(frame) if not f.f_code.co_filename.startswith(OWN)]
        self.place = next((f"{f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}" for f in callers), "?")
        self.generators = {f for f in callers if f.f_code.co_flags & SUSPENDABLE}
        self.around = around


def _callers(frame: Any) -> list[Any]:
    """A frame of this thread and those that called it."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _calls(thread: threading.Thread) -> bool:
    """Whether a call of a pipeline runs on a thread."""
    return any(running == thread.ident for running, _ in list(_running))


def lock_of(denoiser: Any) -> PipelineLock:
    """The lock of a denoiser, whoever asks."""
    with _patching:
        return _locks.setdefault(denoiser, PipelineLock())


def _task() -> Any:
    """The task of asyncio that runs, if any."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


# ---- calls of a pipeline


def lock_calls(pipe: Any, around: Around, undo: Undo) -> None:
    """Have every call of `pipe` run inside `around()`, a method that holds a lock.

    Python looks a call up on the class. So the class gets a `__call__` that asks which object is called, while one of its
    pipelines has a mixture. A scheduler holds the state of one call, so calls could not overlap without a mixture either.

    Returns once the calls of other threads that had begun are over.
    """
    undo.callback(unlock_calls, pipe)
    kind, me = type(pipe), threading.get_ident()
    collected = finalize(pipe, _give_back, kind)  # a pipeline that nobody detached
    collected.atexit = False
    undo.callback(collected.detach)
    with _patching:
        _around[pipe] = WeakMethod(around)
        if kind not in _patched or not _reaches(kind.__call__, _patched[kind][0]):
            _patch(kind)
    code = _code(kind)
    while any(running is pipe and thread != me for thread, running in list(_running)) or any(
        frame in _begun and frame.f_code is code for frame in _frames_of_others()
    ):
        time.sleep(0.02)


def calls_are_locked(pipe: Any) -> bool:
    """Whether calls of `pipe` run inside something."""
    return pipe in _around


def unlock_calls(pipe: Any) -> None:
    """Give back the class's own `__call__`, where no other of its pipelines has a mixture."""
    with _patching:
        _around.pop(pipe, None)
        _give_back(type(pipe))


def _give_back(kind: Any) -> None:
    with _patching:
        ours, had_own = _patched.get(kind, (None, False))
        if ours is None or any(type(pipe) is kind for pipe in list(_around)):
            return
        # Where someone has wrapped ours since, it stays inside theirs and does nothing.
        if vars(kind).get("__call__") is ours:
            if had_own:
                kind.__call__ = ours.__wrapped__  # type: ignore[attr-defined]
            else:
                del kind.__call__
            _patched.pop(kind, None)


def _patch(kind: Any) -> None:
    found: Any = kind.__call__
    while any(found is ours for ours, _ in _patched.values()):  # of a class that this one inherits from
        found = found.__wrapped__
    _patched[kind] = _asking(found), "__call__" in vars(kind)
    kind.__call__ = _patched[kind][0]
    frames, code = list(_frames_of_others()), _code(kind)
    _begun[:] = [frame for frame in frames if frame in _begun or frame.f_code is code]


def _asking(found: Call) -> Call:
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


def _reaches(call: Any, ours: Call) -> bool:
    """Whether `call` is `ours`, or wraps it."""
    while call is not None and call is not ours:
        call = getattr(call, "__wrapped__", None)
    return call is ours


def _code(kind: type) -> Any:
    """The code of the host's own `__call__`."""
    return getattr(inspect.unwrap(kind.__call__), "__code__", None)


def _frames_of_others() -> Iterator[Any]:
    """The frames of the other threads. Their `f_locals` must not be read: that is not safe while they run."""
    for thread, frame in sys._current_frames().items():
        while frame is not None and thread != threading.get_ident():
            yield frame
            frame = frame.f_back  # type: ignore[assignment]
