"""Jobs: all work on the pipeline, one job after the other, in a thread of their own.

A job belongs to a visitor, not to a page, so a reloaded page finds it again and can stop it at any time. Jobs end with the
app.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch

from mole_app.studio.memory import clear_frames

MAX_WAITING, MAX_OWN = 32, 8  # jobs that wait in the queue, of all visitors and of one
KEPT = 64  # finished jobs that can still be looked up
MAX_HEIRS = 1024  # owners whose jobs are another's
FULL = 'the GPU\'s memory is full: take a smaller picture or less "Hires", or start the app with --offload model'
ReportProgress = Callable[[Any], None]
Work = Callable[[ReportProgress], Any]


class StoppedError(Exception):
    """Raised inside a job to end it."""


def ignore(event: Any) -> None:
    """A report function that does nothing."""


class Job:
    """One piece of work.

    Attributes:
        number: no two jobs of an app have the same.
        owner: the visitor.
        kind: "compose", "train", ...
        title: what it makes, for a list of jobs.
        state: "waiting", "running", "done", "stopped" or "failed".
        event: the last report; once the job is done, the result of its work.
        error: why it failed.
        is_shown: whether a page has shown how the job ended.
    """

    _numbers = count()

    def __init__(self, owner: str, kind: str, work: Work, title: str = ""):
        self.number, self.title = next(self._numbers), title
        self.owner, self.kind, self.state, self.work = owner, kind, "waiting", work
        self.event: Any = None
        self.error: Exception | None = None
        self.is_asked_to_stop = self.is_shown = False

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, so that nothing will change any more."""
        return self.state in ("done", "stopped", "failed")


class Jobs:
    """The queue. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: list[Job] = []  # the last KEPT that are over, as they ended; that which runs; those that wait
        self._heirs: dict[str, str] = {}  # an owner -> who has their jobs now
        self._thread: threading.Thread | None = None

    def submit(self, owner: str, kind: str, work: Work, title: str = "") -> Job:
        """Put work in the queue. It is called as `work(report)`, and `report` raises StoppedError if the job must stop.

        Raises ValueError if too many jobs are waiting, of all visitors or of this one.
        """
        with self._changed:
            owner = self._heirs.get(owner, owner)
            job = Job(owner, kind, work, title)
            waiting = [job.owner for job in self._jobs if job.state == "waiting"]
            if len(waiting) >= MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} jobs are waiting already; try again when some are done")
            if waiting.count(owner) >= MAX_OWN:
                raise ValueError(f"{MAX_OWN} of your jobs are waiting already; try again when some are done")
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
        return job

    def hand_over(self, owner: str, to: str) -> None:
        """Give all jobs of an owner to another, also those that are still to come."""
        with self._changed:
            self._heirs = dict([*self._heirs.items()][1 - MAX_HEIRS :]) | {owner: to}
            for job in self._jobs:
                job.owner = to if job.owner == owner else job.owner

    def of(self, owner: str, kind: str) -> list[Job]:
        """The owner's jobs of a kind: those that are over, as they ended; the one that runs; those that wait, in order."""
        with self._changed:
            owner = self._heirs.get(owner, owner)
            return [job for job in self._jobs if (job.owner, job.kind) == (owner, kind)]

    def latest(self, owner: str, kind: str) -> Job | None:
        """The visitor's newest job of a kind, in any state, or None."""
        return next(reversed(self.of(owner, kind)), None)

    def ahead(self, job: Job) -> int:
        """The number of jobs before one that is waiting."""
        with self._changed:
            return [each for each in self._jobs if not each.is_over].index(job) if job.state == "waiting" else 0

    def advance(self, job: Job) -> bool:
        """Let a waiting job change places with the one of the same owner that waits before it. Returns False if there is
        none."""
        with self._changed:
            own = [i for i, each in enumerate(self._jobs) if each.state == "waiting" and each.owner == job.owner]
            here = next((k for k, i in enumerate(own) if self._jobs[i] is job), 0)
            if here == 0:
                return False
            one, two = own[here - 1 : here + 1]
            self._jobs[one], self._jobs[two] = self._jobs[two], self._jobs[one]
            return True

    def stop(self, job: Job) -> bool:
        """Take a job out of the queue, or end it at its next report. Returns False if it is already over."""
        with self._changed:
            if job.is_over:
                return False
            job.is_asked_to_stop = True
            if job.state == "waiting":
                self._end(job, "stopped")
            return True

    def stop_all(self, owner: str, kind: str) -> bool:
        """Stop all jobs of a visitor of a kind. Returns False if there are none that are not over."""
        with self._changed:  # so that none begins meanwhile
            stopped = [self.stop(job) for job in self.of(owner, kind)]
        return any(stopped)

    def follow(self, job: Job) -> Iterator[Job]:
        """Yield the job again and again while it makes progress, until it is over."""
        is_over = False
        while not is_over:
            is_over = job.is_over
            yield job
            with self._changed:
                self._changed.wait_for(lambda: job.is_over, timeout=1.0 if job.state == "waiting" else 0.4)

    # ---- the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            state = "failed"
            try:
                job.event, state = job.work(partial(self._report, job)), "done"
            except StoppedError:
                state = "stopped"
            except Exception as error:
                job.error = ValueError(FULL) if isinstance(error, torch.OutOfMemoryError) else error
                if not isinstance(error, ValueError | FileNotFoundError):  # those tell the visitor what to fix
                    logging.getLogger(__name__).exception("the job %r failed", job.kind)
                clear_frames(error)
            with self._changed:
                self._end(job, state)

    def _next(self) -> Job | None:
        with self._changed:
            job = next((job for job in self._jobs if job.state == "waiting"), None)
            if job is None:
                self._thread = None
            else:
                job.state = "running"
            return job

    def _report(self, job: Job, event: Any) -> None:
        job.event = event
        if job.is_asked_to_stop:
            raise StoppedError

    def _end(self, job: Job, state: str) -> None:
        job.state, job.work = state, ignore  # frees what the work held
        ended = [each for each in self._jobs if each.is_over and each is not job]
        self._jobs = [*ended, job][-KEPT:] + [each for each in self._jobs if not each.is_over]
        self._changed.notify_all()
