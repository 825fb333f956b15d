"""Jobs on the page: buttons that start and stop one, its progress, also after a reload, and what an earlier run of the app
has left, offered again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app.actions import Progress
from mole_diffusers.app.interrupted import read
from mole_diffusers.app.jobs import Job, Jobs, Work
from mole_diffusers.app.page import PRIVATE, Page, Values, session
from mole_diffusers.app.sentences import USER_ERRORS, markdown, problem
from mole_diffusers.studio.recipe import Recipe

SHOWN: dict[str, Any] = {"concurrency_limit": None, **PRIVATE}  # of events that follow a job


class Offer:
    """A row that offers a visitor's oldest job of a kind that was left: to start it again, or to forget it.

    Args:
        again: the label of the button that starts it.
        keep: values of the job's inputs -> what it can be started from again: its "recipe", and plain data.
        load: that data as it was read -> arguments of `describe` and `plan` beside the recipe.
        describe: these -> what the job is called, as Markdown.
        plan: the values of `inputs`, and these by name -> its work.
    """

    def __init__(
        self,
        page: Page,
        kind: str,
        again: str,
        *,
        keep: Callable[..., dict[str, Any]],
        load: Callable[[dict[str, Any]], dict[str, Any]],
        describe: Callable[..., str],
        plan: Callable[..., Work],
        inputs: Sequence[Any] = (),
    ):
        self.page, self.kind, self.inputs = page, kind, inputs
        self._keep, self._load, self._describe, self._plan = keep, load, describe, plan
        with gr.Row(visible=False, elem_id=f"{kind}-interrupted", elem_classes="interrupted") as self.row:
            self.said = gr.Markdown("", elem_classes="status")
            self.start = gr.Button(again, size="sm", min_width=100)
            forget = gr.Button("Forget it", size="sm", min_width=100)
        self.offered = gr.Textbox("", visible=False)  # its file's name: another page of the visitor may have taken it since
        self.shown = [self.row, self.said, self.offered]

        def drop(visitor: str, offered: str) -> Any:
            for path in self._left(visitor, offered):
                path.unlink(missing_ok=True)
            return self.show(visitor)

        forget.click(drop, [page.visitor, self.offered], self.shown, **PRIVATE)
        page.entered.then(self.show, page.visitor, self.shown, **SHOWN)

    def show(self, visitor: str) -> Values:
        """The row as it is for a visitor."""
        if not (left := self._left(visitor)):
            return {self.row: gr.update(visible=False), self.said: "", self.offered: ""}
        more = f" One of {len(left)}." if len(left) > 1 else ""
        try:
            words = f"{self._describe(**self._read(left[0]))} was interrupted when the app ended.{more}"
        except ValueError as error:
            words = f"A job was interrupted when the app ended, and {error}.{more}"
        return {self.row: gr.update(visible=True), self.said: words, self.offered: left[0].name}

    def keep(self, owner: str, *values: Any) -> Any:
        """Write down a job with these inputs; the file."""
        kept = self._keep(*values)
        recipe = replace(kept["recipe"], base=self.page.actions.studio.base)
        return self.page.interrupted.keep(owner, self.kind, kept | {"recipe": recipe.to_dict()})

    def submit(self, visitor: str, offered: str, *values: Any) -> Job:
        """Start the job again that was offered. Raises ValueError where it cannot be."""
        if not (left := self._left(visitor, offered)):
            raise ValueError("this was started again or forgotten already")
        kept = self._read(left[0])
        self.page.actions.check_base(kept["recipe"].base, "change it first")
        work = self._plan(*values, **kept)
        return self.page.jobs.submit(visitor, self.kind, work, lambda: self.page.interrupted.queued(left[0]))

    def _left(self, visitor: str, offered: str | None = None) -> list[Path]:
        """The visitor's files of this kind, the oldest first; only that of this name."""
        return [path for path in self.page.interrupted.left(visitor or "", self.kind) if offered in (None, path.name)]

    def _read(self, path: Path) -> dict[str, Any]:
        return read(path, lambda kept: {"recipe": Recipe.from_dict(kept["recipe"]), **self._load(kept)})


def connect_job(
    page: Page,
    kind: str,
    start: Sequence[Callable[..., Any]],
    plan: Callable[..., Work],
    show: Callable[[Job], Values],
    *,
    inputs: Sequence[Any],
    status: Any,
    outputs: Sequence[Any],
    offer: Offer | None = None,
) -> list[Any]:
    """Let events start a job whose progress the page shows, also after a reload; what each event leads to.

    Args:
        start: events, for example `button.click`.
        plan: the values of `inputs` -> the work. A ValueError is shown in the status.
        show: the job, as it is now -> values for `outputs`, but for those that stay as they are.
        offer: of jobs that were interrupted; by default they are lost when the app ends.
    """
    shown = [status, *outputs]

    def watch(request: gr.Request, job: Job) -> Iterator[Values]:
        before: Values = {}
        for _ in page.watch(request, kind, job):
            now = show(job) if job.event is not None else {}
            yield {status: _said(page.jobs, job)} | {c: v for c, v in now.items() if c not in before or before[c] != v}
            before |= now

    def started(request: gr.Request, submit: Callable[[], Job]) -> Iterator[Values]:
        try:
            job = submit()
        except USER_ERRORS as error:
            yield {status: problem(error)}
        else:
            yield from watch(request, job)

    def begin(request: gr.Request, visitor: str, *values: Any) -> Iterator[Values]:
        owner = visitor or session(request)
        keep = None if offer is None else partial(offer.keep, owner, *values)
        yield from started(request, lambda: page.jobs.submit(owner, kind, plan(*values), keep))

    def resume(request: gr.Request, visitor: str) -> Iterator[Any]:
        job = page.jobs.latest(visitor, kind)
        yield from [gr.skip()] if job is None else watch(request, job)

    page.entered.then(resume, page.visitor, shown, **SHOWN)
    if offer is not None:

        def begin_again(request: gr.Request, visitor: str, offered: str, *values: Any) -> Iterator[Values]:
            yield from started(request, lambda: offer.submit(visitor, offered, *values))

        hidden = offer.start.click(lambda: gr.update(visible=False), None, offer.row, **PRIVATE)
        again = hidden.then(begin_again, [page.visitor, offer.offered, *offer.inputs], shown, **SHOWN)
        again.then(offer.show, page.visitor, offer.shown, **PRIVATE)
    return [event(begin, [page.visitor, *inputs], shown, **SHOWN) for event in start]


def connect_cancel(page: Page, button: Any, status: Any, kinds: Sequence[str]) -> None:
    """Let a button stop what this page watches of these kinds: a running job at its next step, one that waits at once."""

    def cancel(request: gr.Request) -> Any:
        jobs = [page.watched(request, kind) for kind in kinds]
        stopped = [page.jobs.stop(job) for job in jobs if job is not None]
        return gr.skip() if any(stopped) else "nothing of yours is running"  # else the job itself says what becomes of it

    button.click(cancel, None, status, **SHOWN)


def _said(jobs: Jobs, job: Job) -> str:
    """What the status line says about a job."""
    if job.state == "waiting":
        ahead = jobs.ahead(job)
        return f"waiting: {ahead} job{'' if ahead == 1 else 's'} before this one"
    if job.state == "failed":
        return problem(job.error)
    if job.is_asked_to_stop and not job.is_over:
        return "stopping"
    if job.event is None:
        return "cancelled before it began" if job.state == "stopped" else "starting"
    if job.state == "stopped" and isinstance(job.event, Progress):
        return f"stopped after {len(job.event.pictures)} of {job.event.count} pictures"
    words = markdown(str(job.event))
    return f"stopped: {words}" if job.state == "stopped" else words
