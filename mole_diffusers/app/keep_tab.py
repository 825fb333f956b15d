"""The Keep tab: load pictures and recipes; save recipes, code and one merged LoRA; make XY grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app.files import uploaded
from mole_diffusers.app.jobs import Job, Work
from mole_diffusers.app.page import ORDERED, Page, Values
from mole_diffusers.app.page_jobs import buttons, connect_job
from mole_diffusers.app.sentences import errors_to, markdown
from mole_diffusers.app.style import figure, row, status_line
from mole_diffusers.studio import infotext, xy_grid
from mole_diffusers.studio.as_code import as_code
from mole_diffusers.studio.picture_passes import with_pictures
from mole_diffusers.studio.recipe import Recipe


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    with gr.Row(elem_classes="phone-column"):
        with gr.Column():
            _loading(page)
            _saving(page)
        with gr.Column():
            _grid(page)


def _loading(page: Page) -> None:
    dropped = gr.File(
        label="Drop a picture or a recipe: it fills every field", file_types=[".png", ".json"], elem_id="dropped"
    )
    status = status_line(elem_id="dropped-status")

    @errors_to(status)
    def load(path: str) -> Values:
        with uploaded(Path(path)) as file:
            found = infotext.contents(file)
            recipe, values, notes = page.filled(found)
        button = "Make the grid" if found.axes else "Compose"
        words = f"loaded: seed {recipe.seed}, {len(recipe.experts)} LoRAs, gates {recipe.gates}"
        return values | {status: markdown("; ".join([words, *notes, f"now press {button}"]))}

    dropped.upload(load, dropped, [*page.filled_fields, status], **ORDERED)


def _saving(page: Page) -> None:
    with gr.Row():
        save = gr.Button("Recipe as a file", elem_id="save")
        code = gr.Button("As Python code", elem_id="code")
        export = gr.Button("Export to one LoRA", elem_id="export")
    rank = gr.Number(0, label="Rank of the LoRA", info="0: the sum of all ranks, without loss", precision=0, minimum=0)
    file = gr.File(label="File", interactive=False, elem_id="files")
    status = status_line(elem_id="keep-status")
    text = gr.Code(label="Code", language="python", interactive=False, elem_id="code-text", buttons=["copy"])

    def completed(*values: Any) -> Recipe:
        recipe, over = page.asked(*values)
        return page.actions.studio.complete(with_pictures(recipe, **over))

    @errors_to(status)
    def recipe_file(*values: Any) -> Values:
        recipe = completed(*values)
        path = page.actions.new_folder() / f"recipe-{recipe.seed}.json"  # others may save one of this seed
        recipe.save(path)
        return {file: str(path)}

    @errors_to(status)
    def script(*values: Any) -> Values:
        return {text: as_code(completed(*values), page.actions.studio.config)}

    def work_of(recipe: Recipe, rank: int | None, _: Any) -> Work:
        return page.actions.export(recipe, rank or None)

    def show(job: Job) -> Values:
        return {file: str(job.event.path)} if job.state == "done" and job.event.path.exists() else {}

    save.click(recipe_file, [*page.inputs, page.over], [file, status])
    code.click(script, [*page.inputs, page.over], [text, status])
    connect_job(page, "export", [export.click], work_of, show, [status, file], more=[rank], draws=False)


def _grid(page: Page) -> None:
    others = ", ".join(kind for kind in xy_grid.AXES if kind not in ("seed", "weight", "arm"))
    gr.Markdown(
        "**XY grid.** An axis is `seed=1,2,3`, `weight fox=0,0.5,1` or `arm=base,sum,gates`. An arm is a way to combine the "
        f"LoRAs: base (none of them), alone NAME, sum, merge METHOD or gates. The others are {markdown(others)}."
    )
    row(*page.axes)
    make, status = buttons(page, "grid", "Make the grid")
    sheet = figure(label="Grid", elem_id="sheet")

    def show(job: Job) -> Values:
        return {sheet: job.event.sheet}

    connect_job(page, "grid", [make.click], page.actions.grid, show, [status, sheet], more=page.axes)
