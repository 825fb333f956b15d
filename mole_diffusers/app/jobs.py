"""Jobs: work in a thread that reports events while it runs, and can be stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any

DONE = object()
Report = Callable[[Any], None]
IsStopped = Callable[[], bool]


class StoppedError(Exception):
    """Raised inside a job to end it."""


def never_stopped() -> bool:
    """For jobs that nobody can stop."""
    return False


def run_job(work: Callable[[Report], None], is_stopped: IsStopped) -> Iterator[Any]:
    """Run `work(report)` in a thread and yield what it reports; an exception in `work` is raised here.

    `report` raises StoppedError once `is_stopped()` is true, or once nobody iterates any more; work ended by it counts as
    done. If nothing is reported for a second, None is yielded, so that the caller can do something else in between.
    """
    events: Queue[Any] = Queue()
    abandoned = threading.Event()

    def report(event: Any) -> None:
        events.put(event)
        if is_stopped() or abandoned.is_set():
            raise StoppedError

    def run() -> None:
        try:
            work(report)
        except StoppedError:
            pass
        except BaseException as error:
            events.put(error)
        finally:
            events.put(DONE)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            try:
                event = events.get(timeout=1.0)
            except Empty:
                event = None
            if event is DONE:
                return
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        abandoned.set()


class RunningJobs:
    """The running job of each session, and who asked to stop it."""

    def __init__(self) -> None:
        self._stop_events: dict[str, threading.Event] = {}

    @contextmanager
    def job(self, session: str) -> Iterator[IsStopped]:
        """Register a job of a session; yields a function that tells whether `stop` was called meanwhile."""
        event = self._stop_events[session] = threading.Event()
        try:
            yield event.is_set
        finally:
            self._stop_events.pop(session, None)

    def stop(self, session: str) -> bool:
        """End the session's job at its next report; False if none is running."""
        if (event := self._stop_events.get(session)) is None:
            return False
        event.set()
        return True
