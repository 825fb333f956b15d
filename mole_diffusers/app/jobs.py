"""Work that is watched while it goes on, and can be stopped: a thread that tells, and a generator that listens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any

from mole_diffusers.studio.render import StoppedError

DONE = object()
Tell = Callable[[Any], None]
Stopped = Callable[[], bool]


def watched(work: Callable[[Tell], None], stopped: Stopped) -> Iterator[Any]:
    """What `work(tell)` tells, as it tells it; an exception in `work` comes out here.

    `tell` raises StoppedError once `stopped()` says so; work that it ends counts as done. Where nothing is told for a
    while, None comes out, so that whoever iterates can look around. Work that nobody listens to any more is stopped.
    """
    heard: Queue[Any] = Queue()
    left = threading.Event()

    def tell(event: Any) -> None:
        heard.put(event)
        if stopped() or left.is_set():
            raise StoppedError

    def run() -> None:
        try:
            work(tell)
        except StoppedError:
            pass
        except BaseException as error:
            heard.put(error)
        finally:
            heard.put(DONE)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (event := _next(heard)) is not DONE:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        left.set()


def _next(heard: Queue[Any]) -> Any:
    try:
        return heard.get(timeout=1.0)
    except Empty:
        return None


class Stops:
    """Who asked to stop, by session."""

    def __init__(self) -> None:
        self._running: dict[str, threading.Event] = {}

    @contextmanager
    def job(self, session: str) -> Iterator[Stopped]:
        """A job of a session; what it gives says whether `stop` was called meanwhile."""
        event = self._running[session] = threading.Event()
        try:
            yield event.is_set
        finally:
            self._running.pop(session, None)

    def stop(self, session: str) -> bool:
        """End the session's job at its next step; False where none is running."""
        if (event := self._running.get(session)) is None:
            return False
        event.set()
        return True
