"""Jobs on the page: buttons that start and stop them, and their progress, also after a reload.

Jobs that were interrupted when the app ended are offered again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app import draw_over
from mole_diffusers.app.actions import Over, Progress
from mole_diffusers.app.jobs import Job, Jobs, Work
from mole_diffusers.app.page import Page, Values, session
from mole_diffusers.app.sentences import USER_ERRORS, markdown, problem, without_folders
from mole_diffusers.app.style import status_line
from mole_diffusers.binding.as_text import mask_text, read_mask
from mole_diffusers.lora.safe_files import read_json
from mole_diffusers.studio.picture_passes import with_pictures
from mole_diffusers.studio.recipe import Recipe

Show = Callable[[Job], Values]
Refused = Callable[[Exception], Values] | None
Way = tuple[Callable[..., Any], Callable[..., Job], Sequence[Any]]  # event, (owner, *values) -> job, the values' components


class Offer:
    """A row that offers a visitor's oldest interrupted job of a kind: start it again, or forget it.

    Args:
        again: the label of the button that starts it.
        describe: the job's recipe and the values of `more` in `connect_job` -> what to call it, as Markdown.
    """

    def __init__(self, page: Page, kind: str, again: str, describe: Callable[..., str]):
        self.page, self.kind, self._describe = page, kind, describe
        with gr.Row(visible=False, elem_id=f"{kind}-interrupted", elem_classes="interrupted") as self.row:
            self.said = status_line()
            self.start = gr.Button(again, size="sm", min_width=100)
            forget = gr.Button("Forget it", size="sm", min_width=100)
        self.offered = gr.Textbox("", visible=False)  # the file's name; another page may have taken the job since
        self.shown = [self.row, self.said, self.offered]

        def drop(visitor: str, offered: str) -> Any:
            for path in self._left(visitor, offered):
                path.unlink(missing_ok=True)
            return self.show(visitor)

        forget.click(drop, [page.visitor, self.offered], self.shown)
        page.entered.then(self.show, page.visitor, self.shown, concurrency_limit=None)

    def show(self, visitor: str) -> Values:
        """Updates of the row for a visitor."""
        if not (left := self._left(visitor)):
            return {self.row: gr.update(visible=False), self.said: "", self.offered: ""}
        more = f" One of {len(left)}." if len(left) > 1 else ""
        try:
            recipe, given, _ = _read(left[0])
            words = f"{self._describe(recipe, *given)} was interrupted when the app ended.{more}"
        except ValueError as error:
            words = f"A job was interrupted when the app ended, and {error}.{more}"
        return {self.row: gr.update(visible=True), self.said: words, self.offered: left[0].name}

    def taken(self, visitor: str, offered: str, editor: Any) -> tuple[Path, list[Any]]:
        """The file of the offered job, and the arguments of its `plan`, with the picture that is in the editor now.

        Raises ValueError if the job cannot be started again.
        """
        if not (left := self._left(visitor, offered)):
            raise ValueError("this was started again or forgotten already")
        recipe, given, mask = _read(left[0])
        self.page.actions.check_base(recipe.base, "change it first")
        over = draw_over.pictures(editor if recipe.image else None)
        over.pop("mask", None)  # ignore what is painted now
        if over and mask:
            over["mask"] = read_mask(mask)
        return left[0], [recipe, *given, over]

    def _left(self, visitor: str, offered: str | None = None) -> list[Path]:
        """The visitor's files of this kind, oldest first; if `offered` is given, only the one with this name."""
        return [path for path in self.page.jobs.left(visitor or "", self.kind) if offered in (None, path.name)]


def connect_job(
    page: Page,
    kind: str,
    start: Sequence[Callable[..., Any]],
    plan: Callable[..., Work],
    show: Show,
    outputs: Sequence[Any],
    *,
    more: Sequence[Any] = (),
    draws: bool = True,
    refused: Refused = None,
    offer: Offer | None = None,
) -> None:
    """Let events start a job on the recipe of the page.

    Args:
        start: events, for example `button.click`.
        plan: the recipe, the values of `more`, and the pictures to draw over -> the work. The status line shows a
            ValueError.
        show, outputs, refused: see `follow`.
        more: further components.
        draws: whether the job draws over the page's picture, if it has one.
        offer: offers interrupted jobs. Without it, they are lost when the app ends.
    """
    editor = page.over if draws else gr.State()

    def begin(owner: str, *values: Any) -> Job:
        recipe, *given, over = page.asked(*values)
        work = plan(recipe, *given, over)
        return page.jobs.submit(owner, kind, work, about=_kept(recipe, given, over) if offer else None)

    ways: list[Way] = [(event, begin, [*page.inputs, *more, editor]) for event in start]
    if offer is not None:

        def begin_again(owner: str, offered: str, editor: Any) -> Job:
            path, arguments = offer.taken(owner, offered, editor)
            return page.jobs.submit(owner, kind, plan(*arguments), file=path)

        hidden = offer.start.click(lambda: gr.update(visible=False), None, offer.row)
        ways.append((hidden.then, begin_again, [offer.offered, editor]))
    *_, last = follow(page, kind, ways, show, outputs, refused)
    if offer is not None:
        last.then(offer.show, page.visitor, offer.shown)


def follow(
    page: Page, kind: str, ways: Sequence[Way], show: Show, outputs: Sequence[Any], refused: Refused = None
) -> list[Any]:
    """Let events start jobs, and show their progress on the page, also after a reload. Returns the resulting events.

    Args:
        show: the job as it is now -> values for those of `outputs` that change.
        outputs: the status line, and the other components that are shown.
        refused: an error that stopped an event -> further values. The status line shows the error.
    """
    status = outputs[0]

    def watch(request: gr.Request, job: Job) -> Iterator[Values]:
        before: Values = {}
        for _ in page.watch(request, kind, job):
            now = show(job) if job.event is not None else {}
            yield {status: _said(page.jobs, job)} | {c: v for c, v in now.items() if c not in before or before[c] != v}
            before |= now

    def beginning(submit: Callable[..., Job]) -> Callable[..., Iterator[Values]]:
        def begin(request: gr.Request, visitor: str, *values: Any) -> Iterator[Values]:
            try:
                job = submit(visitor or session(request), *values)
            except USER_ERRORS as error:
                yield {status: problem(error)} | (refused(error) if refused else {})
            else:
                yield from watch(request, job)

        return begin

    def resume(request: gr.Request, visitor: str) -> Iterator[Any]:
        job = page.jobs.latest(visitor, kind)
        yield from [gr.skip()] if job is None else watch(request, job)

    page.entered.then(resume, page.visitor, outputs, concurrency_limit=None)
    each: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": None}  # every press is a job of its own
    return [event(beginning(submit), [page.visitor, *inputs], outputs, **each) for event, submit, inputs in ways]


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
        is_any = page.jobs.stop_all(visitor or session(request), kind)
        return gr.skip() if is_any else "nothing of yours is running"  # else the job itself reports that it stops

    stops.click(cancel, page.visitor, status, concurrency_limit=None)
    return starts, status


def _kept(recipe: Recipe, given: list[Any], over: Over) -> dict[str, Any]:
    """Plain data from which a job can be started again. Of the pictures to draw over, it has only the mask."""
    mask = mask_text(over["mask"]) if "mask" in over else ""
    return {"recipe": with_pictures(recipe, **over).to_dict(), "more": given, "mask": mask}


def _read(path: Path) -> tuple[Recipe, list[Any], str]:
    """The recipe, the further values and the mask (as text) of a job. Raises ValueError if they cannot be used."""
    try:
        kept = read_json(path)
        return Recipe.from_dict(kept["recipe"]), [*kept["more"]], kept["mask"]
    except (FileNotFoundError, TypeError, KeyError, ValueError) as error:
        reason = without_folders(str(error)) if isinstance(error, ValueError) else "it is of another release"
        raise ValueError(f"what was kept of this job cannot be used: {reason}") from error


def _said(jobs: Jobs, job: Job) -> str:
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
    words = markdown(str(job.event))
    return f"stopped: {words}" if job.state == "stopped" else words
