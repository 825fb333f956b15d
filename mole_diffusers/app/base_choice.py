"""The choice of the base model above the tabs, where the app has several."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mole_diffusers.app.jobs import Job, Work
from mole_diffusers.app.page import PRIVATE, Page, connect_job, redraw


def build(page: Page) -> Any:
    """Lay it out; returns its status line."""
    bases, info = list(page.actions.bases), "for everyone here; waits for the jobs before it"
    page.base = gr.Dropdown(
        bases, value=page.actions.base, label="Base model", info=info, visible=len(bases) > 1, elem_id="base"
    )
    return gr.Markdown("", elem_id="base-status", elem_classes="status")


def connect(page: Page, status: Any) -> None:
    """Connect it, once the tabs are there, whose lists and sizes are those of the base."""
    sizes = [page.controls[name] for name in ("width", "height", "guidance")]
    lists, updates = zip(*page.lists, strict=True)
    outputs = [page.base, *sizes, *lists]

    def plan(*values: Any) -> Work:
        return page.actions.change_base(values[0])

    def show(job: Job) -> list[Any]:
        if not job.is_over or job.is_shown:  # after a reload, what was chosen since then stays
            return [None] * len(outputs)
        if job.state != "done":
            return [page.actions.base or gr.update(value=None), *[None] * (len(outputs) - 1)]
        fresh = page.fresh()
        first: dict[Any, dict[str, Any]] = {page.controls["sampler"]: {"value": "default"}}
        listed = [gr.update(**each(), **first.get(field, {})) for field, each in zip(lists, updates, strict=True)]
        return [page.actions.base, *page.shown_size(fresh).values(), fresh.guidance, *listed]

    inputs = [page.base]
    for event in connect_job(page, "base", [page.base.input], plan, show, inputs=inputs, status=status, outputs=outputs):
        event.then(redraw, page.cards, page.shown, **PRIVATE)
