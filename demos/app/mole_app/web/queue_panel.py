"""The visitor's queue of pictures: one button that composes or cancels, the jobs that wait, and what the page shows of them.

The queue is the server's. A page that is reloaded, and a second one of the same browser, show the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from mole_app.studio.prompt_syntax import parse
from mole_app.studio.recipe import Recipe
from mole_app.web.api import is_gone
from mole_app.web.jobs import Job
from mole_app.web.page import Page
from mole_app.web.page_jobs import said
from mole_app.web.prompt_box import ORDERED
from mole_app.web.sentences import errors_to, markdown
from mole_app.web.stage import Stage
from mole_app.web.style import Values, status_line
from mole_app.web.visits import owner, session

COMPOSE, CANCEL = "Compose", "Cancel"  # what the button does, and says
KIND = "compose"
EVERY = 0.4  # seconds between looks at the queue
Rows = list[dict[str, Any]]  # of the queue: number of the job, title


class QueuePanel:
    """The components of the queue. Each is laid out (`render`) where it belongs.

    Attributes:
        button: composes, or cancels the picture that is drawn.
        more: puts another picture into the queue.
        status: the line that says how far the first job is.
        bar: the same as a bar.
        rows: the jobs of the list, first that which is drawn (state).
    """

    def __init__(self, page: Page):
        self.page = page
        self.button = gr.Button(COMPOSE, variant="primary", elem_id=KIND, scale=3, min_width=120, render=False)
        self.more = gr.Button("Queue", elem_id="queue-more", scale=1, min_width=80, render=False)
        self.status = status_line(elem_id=f"{KIND}-status", render=False)
        self.bar = gr.HTML("", elem_id="bar", render=False)
        self.rows = gr.State([])

    def view(self, request: gr.Request, visitor: str, stage: Stage) -> tuple[int, Values]:
        """The number of the job that is shown, -1 for none, and what the page shows of the visitor's queue."""
        jobs = self.page.visits.jobs.of(owner(request, visitor), KIND)
        going = [job for job in jobs if not job.is_over]
        shown = going[0] if going else next(reversed(jobs), None)
        label, variant = (CANCEL, "stop") if going else (COMPOSE, "primary")
        rows: Rows = [{"number": job.number, "title": job.title} for job in going]
        values: Values = {self.button: gr.update(value=label, variant=variant), self.rows: rows}
        if shown is None:
            return -1, values | stage.first()
        values |= {self.status: said(self.page.visits.jobs, shown), self.bar: _bar(shown)}
        return shown.number, values | stage.shows(shown.event, shown.is_over)

    def connect(self, stage: Stage, starts: Sequence[Any], inputs: Sequence[Any]) -> None:
        """Let events put pictures into the queue, and show on the page how it goes.

        Args:
            starts: further events that compose, for example `prompt.submit`.
            inputs: the components of a recipe, the number of pictures, and the given pictures.
        """
        page = self.page
        every_press: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": None}  # is a job of its own

        @errors_to(self.status)
        def queued(request: gr.Request, visitor: str, *values: Any) -> Values:
            recipe, count, pictures = page.form.asked(*values)
            work = page.actions.compose(recipe, count, pictures)
            page.visits.jobs.submit(owner(request, visitor), KIND, work, self.title(recipe, count))
            return {self.status: gr.skip()}  # `watch` shows it; from here it could come after the job is over

        @errors_to(self.status)
        def pressed(request: gr.Request, label: str, visitor: str, *values: Any) -> Any:
            if label != CANCEL:
                return queued(request, visitor, *values)
            going = [job for job in page.visits.jobs.of(owner(request, visitor), KIND) if not job.is_over]
            stopped = [page.visits.jobs.stop(job) for job in going[:1]]
            return {self.status: gr.skip() if any(stopped) else "nothing of yours is running"}

        async def watch(request: gr.Request, visitor: str) -> AsyncIterator[Values]:
            before, at = Values(), -2
            while not is_gone(page.blocks, session(request)):
                number, now = await asyncio.to_thread(self.view, request, visitor, stage)
                if changed := {c: v for c, v in now.items() if number != at or c not in before or before[c] != v}:
                    yield changed
                before, at = now, number
                await asyncio.sleep(EVERY)

        given = [page.visits.visitor, *inputs]
        self.button.click(pressed, [self.button, *given], self.status, **every_press)
        for start in (self.more.click, *starts):
            start(queued, given, self.status, **every_press)
        watched = [self.status, self.button, self.bar, self.rows, *stage.outputs]
        page.entered.then(watch, page.visits.visitor, watched, concurrency_limit=None, show_progress="hidden")

    def shows_the_picture(self, cover: Any) -> None:
        """Let the buttons that compose hide what covers the picture."""
        starts = [self.button.click, self.more.click, self.page.prompt.text.submit]
        gr.on(starts, lambda: gr.update(visible=False), None, cover, queue=False, show_progress="hidden")

    def title(self, recipe: Recipe, count: int) -> str:
        """What a job draws, for the list."""
        words = parse(recipe.prompt, self.page.actions.studio.catalog.loras).text
        seed = "" if recipe.seed == -1 else f", seed {recipe.seed}"
        return f"{words[:60] or 'no words'}{seed}{f', {count} pictures' if count > 1 else ''}"

    def build_list(self) -> None:
        """Lay out the list of the jobs that wait, which is drawn anew whenever they change.

        It waits for the cards if they are drawn: Gradio draws one thing at a time on a page, or fails.
        """

        @gr.render(inputs=[self.rows], triggers=[self.rows.change], show_progress="hidden", **ORDERED)
        def listed(rows: Rows) -> None:
            if len(rows) < 2:
                return
            gr.Markdown(f"**Queue** · {len(rows) - 1} waiting", elem_classes="heading")
            for place, row in enumerate(rows):
                with gr.Row(elem_classes="job", equal_height=True):
                    gr.Markdown(f"{'now' if place == 0 else place} · {markdown(row['title'])}")
                    if place > 1:
                        self._button("Up", row, self.page.visits.jobs.advance)
                    if place > 0:
                        self._button("Cancel", row, self.page.visits.jobs.stop)

    def _button(self, label: str, row: dict[str, Any], does: Callable[[Job], bool]) -> None:
        """A button of a job that waits, and what it does."""
        page = self.page

        def act(request: gr.Request, visitor: str) -> None:
            for job in page.visits.jobs.of(owner(request, visitor), KIND):
                if job.number == row["number"]:
                    does(job)

        button = gr.Button(label, size="sm", min_width=44, scale=0, elem_classes=label.lower())
        button.click(
            act, page.visits.visitor, None, key=(label, row["number"]), concurrency_limit=None, api_visibility="private",
            show_progress_on=[],
        )  # fmt: skip


def _bar(job: Job) -> str:
    """The progress of a job as HTML; it has numbers alone."""
    if job.is_over or job.event is None:
        return ""
    return f'<progress max="{job.event.total}" value="{job.event.done}" aria-label="progress"></progress>'
