"""The Keep tab: pictures and recipes in and out, code, one LoRA, XY xy_grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from mole_diffusers.app.actions import Progress
from mole_diffusers.app.cards import cards_of
from mole_diffusers.app.page import PRIVATE, QUEUE, Page, fresh, picture, say, say_while, session, stoppable
from mole_diffusers.studio import infotext
from mole_diffusers.studio.as_code import as_code


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
    told = gr.Markdown("", elem_id="dropped-status", elem_classes="status")

    @say
    def load(path: str | None) -> Any:
        if path is None:
            return [gr.skip()] * (len(page.inputs) + 3)
        found = page.actions.studio.complete(infotext.read_any(path))
        cards = cards_of(found.prompt, [], page.actions.studio.catalog.loras)
        words = f"loaded: seed {found.seed}, {len(found.experts)} LoRAs, gates {found.gates}; now press Compose"
        return [*page.values(found), cards, fresh(cards), words]

    dropped.upload(load, dropped, [*page.inputs, page.cards, page.shown, told], **PRIVATE)


def _saving(page: Page) -> None:
    with gr.Row():
        save = gr.Button("Recipe as a file", elem_id="save")
        code = gr.Button("As diffusers code", elem_id="code")
        export = gr.Button("Export to one LoRA", elem_id="export")
    rank = gr.Number(0, label="Rank of the LoRA", info="0: ranks add up, nothing is lost", precision=0, minimum=0)
    files = gr.File(label="File", interactive=False, elem_id="files")
    told = gr.Markdown("", elem_id="keep-status", elem_classes="status")
    shown = gr.Code(label="Code", language="python", interactive=False, elem_id="code-text", buttons=["copy"])

    @say
    def saved(*values: Any) -> str:
        found = page.actions.studio.complete(page.recipe(*values))
        path = page.actions.folder / f"recipe-{found.seed}.json"
        found.save(path)
        return str(path)

    @say
    def coded(*values: Any) -> str:
        return as_code(page.actions.studio.complete(page.recipe(*values)))

    @say
    def exported(*values: Any) -> tuple[str, str]:
        *given, rank = values
        path, error = page.actions.export(page.recipe(*given), int(rank) if rank else None)
        return str(path), f"written at the gates' average weights; error of the cut {error:.3f}"

    save.click(saved, page.inputs, files, **PRIVATE)
    code.click(coded, page.inputs, shown, **PRIVATE)
    export.click(exported, [*page.inputs, rank], [files, told], **QUEUE, **PRIVATE)


def _grid(page: Page) -> None:
    gr.Markdown("**XY grid.** An axis is `seed=1,2,3`, `weight fox=0,0.5,1`, `arm=base,sum,gates`; also steps, guidance.")
    with gr.Row():
        x = gr.Textbox("arm=base,sum,gates", label="Across", max_length=500, elem_id="axis-x")
        y = gr.Textbox("seed=0,1", label="Down", max_length=500, elem_id="axis-y")
    with gr.Row():
        make = gr.Button("Make the grid", variant="primary", elem_id="grid")
        cancel = gr.Button("Cancel", elem_id="grid-cancel")
    status = gr.Markdown("", elem_id="grid-status", elem_classes="status")
    sheet = picture("Grid", elem_id="sheet")
    work = make.click(_gridded(page), [*page.inputs, x, y], [status, sheet], **QUEUE, **PRIVATE)
    stoppable(page, cancel, status, [work])


def _gridded(page: Page) -> Callable[..., Iterator[Any]]:
    @say_while
    def gridded(request: gr.Request, *values: Any) -> Iterator[Any]:
        *given, x, y = values
        with page.stops.job(session(request)) as stopped:
            words = ""
            for event in page.actions.grid(page.recipe(*given), x, y, stopped):
                if isinstance(event, Progress):
                    words = str(event)
                    yield words, gr.skip()
                else:
                    yield words, event

    return gridded
