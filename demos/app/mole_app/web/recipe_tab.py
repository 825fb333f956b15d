"""The Recipe tab: load pictures and recipes; save recipes, code and one merged LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from mole_app.studio import infotext
from mole_app.studio.as_code import as_code
from mole_app.studio.picture_passes import with_pictures
from mole_app.studio.recipe import Recipe
from mole_app.web.files import uploaded
from mole_app.web.jobs import Job, Work
from mole_app.web.page import Page
from mole_app.web.page_jobs import connect_job
from mole_app.web.prompt_box import ORDERED
from mole_app.web.sentences import errors_to, markdown
from mole_app.web.style import Values, status_line


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    with gr.Row(elem_classes="phone-column"):
        with gr.Column():
            _loading(page)
        with gr.Column():
            _saving(page)


def _loading(page: Page) -> None:
    dropped = gr.File(
        label="Drop a picture or a recipe here, or a picture anywhere: it fills every field",
        file_types=[".png", ".json"],
        elem_id="dropped",
    )
    status = status_line(elem_id="dropped-status")

    fill_from(page, dropped, status)


def fill_from(page: Page, field: Any, status: Any) -> None:
    """Let a file that is put into a field fill the page with its recipe."""

    @errors_to(status)
    def load(path: str) -> Values:
        with uploaded(Path(path)) as file:
            found = infotext.contents(file)
            recipe, values, notes = page.filled(found)
        button = "Make the grid" if found.axes else "Compose"
        words = f"loaded: seed {recipe.seed}, {len(recipe.experts)} LoRAs"
        return values | {status: markdown("; ".join([words, *notes, f"now press {button}"]))}

    field.upload(load, field, [*page.filled_fields, status], **ORDERED)


def _saving(page: Page) -> None:
    with gr.Row():
        save = gr.Button("Recipe as a file", elem_id="save")
        code = gr.Button("As Python code", elem_id="code")
        export = gr.Button("Export to one LoRA", elem_id="export")
    rank = gr.Number(
        0, elem_id="rank", label="Rank of the LoRA", info="0: the sum of all ranks, without loss", precision=0, minimum=0
    )
    file = gr.File(label="File", interactive=False, visible=False, elem_id="files")
    status = status_line(elem_id="recipe-status")
    text = gr.Code(label="Code", language="python", interactive=False, visible=False, elem_id="code-text", buttons=["copy"])

    def completed(*values: Any) -> Recipe:
        recipe, pictures = page.form.asked(*values)
        return page.actions.studio.complete(with_pictures(recipe, **pictures))

    @errors_to(status)
    def recipe_file(*values: Any) -> Values:
        recipe = completed(*values)
        path = page.actions.new_folder() / f"recipe-{recipe.seed}.json"  # others may save one of this seed
        recipe.save(path)
        return {file: gr.update(value=str(path), visible=True)}

    @errors_to(status)
    def script(*values: Any) -> Values:
        return {text: gr.update(value=as_code(completed(*values), page.actions.studio.base.config), visible=True)}

    def work_of(recipe: Recipe, rank: int | None, _: Any) -> Work:
        return page.actions.export(recipe, rank or None)

    def show(job: Job) -> Values:
        is_there = job.state == "done" and job.event.path.exists()
        return {file: gr.update(value=str(job.event.path), visible=True)} if is_there else {}

    save.click(recipe_file, [*page.form.inputs, *page.pictures], [file, status])
    code.click(script, [*page.form.inputs, *page.pictures], [text, status])
    connect_job(page, "export", [export.click], work_of, show, [status, file], more=[rank], draws=False)
