"""Jobs on the page: buttons that start and stop them, and their progress, also after a reload."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from mole_app.web.actions import Progress
from mole_app.web.jobs import Job, Jobs, Work
from mole_app.web.page import Page
from mole_app.web.sentences import USER_ERRORS, markdown, problem
from mole_app.web.style import Values, status_line
from mole_app.web.visits import owner

Show = Callable[[Job], Values]
Refused = Callable[[Exception], Values] | None


def connect_job(
    page: Page,
    kind: str,
    start: Sequence[Callable[..., Any]],
    work_of: Callable[..., Work],
    show: Show,
    outputs: Sequence[Any],
    *,
    more: Sequence[Any] = (),
    draws: bool = True,
    refused: Refused = None,
) -> None:
    """Let events start a job on the recipe of the page.

    Args:
        work_of: the recipe, the values of `more`, and the given pictures -> the work. The status line shows a
            ValueError.
        start, show, outputs, refused: see `follow`.
        more: further components.
        draws: whether the job draws with the page's given pictures.
    """

    def work(*values: Any) -> Work:
        recipe, *given, pictures = page.form.asked(*values)
        return work_of(recipe, *given, pictures)

    inputs = [*page.form.inputs, *more, *(page.pictures if draws else [gr.State() for _ in page.pictures])]
    follow(page, kind, start, work, inputs, show, outputs, refused)


def follow(
    page: Page,
    kind: str,
    start: Sequence[Callable[..., Any]],
    work_of: Callable[..., Work],
    inputs: Sequence[Any],
    show: Show,
    outputs: Sequence[Any],
    refused: Refused = None,
) -> list[Any]:
    """Let events start jobs, and show their progress on the page, also after a reload. Returns the resulting events.

    Args:
        start: events, for example `button.click`.
        work_of: the values of `inputs` -> the work.
        show: the job as it is now -> values for those of `outputs` that change.
        outputs: the status line, and the other components that are shown.
        refused: an error that stopped an event -> further values. The status line shows the error.
    """
    status = outputs[0]

    def watch(request: gr.Request, job: Job) -> Iterator[Values]:
        before: Values = {}
        for _ in page.visits.watch(request, kind, job):
            now = show(job) if job.event is not None else {}
            yield {status: said(page.visits.jobs, job)} | {c: v for c, v in now.items() if c not in before or before[c] != v}
            before |= now

    def begin(request: gr.Request, visitor: str, *values: Any) -> Iterator[Values]:
        try:
            job = page.visits.jobs.submit(owner(request, visitor), kind, work_of(*values))
        except USER_ERRORS as error:
            yield {status: problem(error)} | (refused(error) if refused else {})
        else:
            yield from watch(request, job)

    def resume(request: gr.Request, visitor: str) -> Iterator[Any]:
        job = page.visits.jobs.latest(owner(request, visitor), kind)
        yield from [gr.skip()] if job is None else watch(request, job)

    page.entered.then(resume, page.visits.visitor, outputs, concurrency_limit=None)
    every_press: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": None}  # is a job of its own
    return [event(begin, [page.visits.visitor, *inputs], outputs, **every_press) for event in start]


def buttons(page: Page, kind: str, start: str, stop: str = "Cancel") -> tuple[Any, Any]:
    """Lay out the buttons that start and stop jobs of a kind, and their status line. Returns the first and the last.

    The second stops all jobs of the visitor: a running job at its next step, waiting ones at once.

    Args:
        start, stop: the labels of the buttons.
    """
    with gr.Row():
        starts = gr.Button(start, variant="primary", elem_id=kind)
        stops = gr.Button(stop, elem_id=f"{kind}-cancel")
    status = status_line(elem_id=f"{kind}-status")

    def cancel(request: gr.Request, visitor: str) -> Any:
        if page.visits.jobs.stop_all(owner(request, visitor), kind):
            return gr.skip()  # the job itself reports that it stops
        return "nothing of yours is running"

    stops.click(cancel, page.visits.visitor, status, concurrency_limit=None)
    return starts, status


def said(jobs: Jobs, job: Job) -> str:
    """The status line for a job."""
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
    words = markdown(str(job.event).replace("expert '", "'"))  # as the API names LoRAs
    return f"stopped: {words}" if job.state == "stopped" else words
