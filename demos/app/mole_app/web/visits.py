"""Visitors of the page and their jobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from mole_app.web.actions import Picture
from mole_app.web.jobs import Job, Jobs

STORED: dict[str, Any] = {"secret": "mole"}  # fixed, since what the browser keeps outlives the app
MAX_WATCHED = 256  # jobs that pages show; of pages that were closed, some are among them


class Visits:
    """The jobs of all visitors, and which of them each open page shows.

    Attributes:
        jobs: the queue.
        visitor: who owns jobs. It is kept in the browser, so that a reload does not change it.
    """

    def __init__(self) -> None:
        self.jobs = Jobs()
        self.visitor = gr.BrowserState("", storage_key="mole-visitor", **STORED)
        self._watched: dict[tuple[str, str], Job] = {}  # (session, kind of job) -> the job that the page shows

    def watch(self, request: gr.Request, kind: str, job: Job) -> Iterator[Job]:
        """Yield the job while it makes progress, until the page starts another one of this kind."""
        key = session(request), kind
        self._watched.pop(key, None)
        self._watched[key] = job  # the newest is last
        over = [shown for shown, watched in [*self._watched.items()] if watched.is_over]
        for shown in over[: max(len(self._watched) - MAX_WATCHED, 0)]:
            self._watched.pop(shown, None)
        for _ in self.jobs.follow(job):
            if self._watched.get(key) is not job:
                return
            yield job
        job.is_shown = True

    def drawn(self, request: gr.Request | None, visitor: str) -> list[Picture]:
        """The pictures that the visitor's jobs composed and whose files are still there, oldest first."""
        events = [job.event for job in self.jobs.of(owner(request, visitor), "compose")]
        return [picture for event in events if event is not None for picture in event.pictures if picture.path.exists()]


def owner(request: gr.Request | None, visitor: str) -> str:
    """Whose a visitor's jobs are: while the page opens, they are its session's."""
    return visitor or session(request)


def session(request: gr.Request | None) -> str:
    """The visitor's session; "" for calls without one."""
    return str(getattr(request, "session_hash", "") or "")
