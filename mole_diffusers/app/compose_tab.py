"""The Compose tab: a prompt, a card per LoRA, pictures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app.cards import Card, added, cards_of
from mole_diffusers.app.mixer import build as mixer
from mole_diffusers.app.mixer import plainly
from mole_diffusers.app.page import PRIVATE, QUEUE, Page, fresh, gallery, say, say_while, session, shown, stoppable
from mole_diffusers.studio.catalog import UNTRAINED
from mole_diffusers.studio.prompt_syntax import parse
from mole_diffusers.studio.render import SAMPLERS


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    _prompts(page)
    with gr.Row(elem_classes="buttons"):
        compose = gr.Button("Compose", variant="primary", elem_id="compose")
        cancel = gr.Button("Cancel", elem_id="cancel")
    status = gr.Markdown("", elem_id="status", elem_classes="status")
    with gr.Row(elem_classes="phone-column"):
        with gr.Column(scale=5):
            adding = _adding(page)
            mixer(page)
            count = _settings(page)
        with gr.Column(scale=4, elem_classes="results"):
            preview = gr.Image(
                label="Now", format="png", interactive=False, height=260, buttons=[], elem_classes="pixel", elem_id="now"
            )
            pictures = gallery("Pictures", columns=2, elem_id="pictures")
    made = [status, preview, pictures, page.made]
    prompt = page.controls["prompt"]
    start = [*page.inputs, count]
    work = gr.on([compose.click, prompt.submit], _composed(page), start, made, **QUEUE, **PRIVATE)
    stoppable(page, cancel, status, [work])
    for event in (prompt.blur, prompt.submit):
        event(_typed(page), [prompt, page.cards], [page.cards, page.shown], show_progress="hidden", **PRIVATE)
    _connect_adding(page, **adding)


def opened(page: Page) -> Callable[[], tuple[list[Card], dict[str, Any]]]:
    """The cards that a fresh page shows."""

    def cards() -> tuple[list[Card], dict[str, Any]]:
        found = cards_of(page.defaults.prompt, [], page.actions.studio.catalog.loras)
        return found, fresh(found)

    return cards


def _prompts(page: Page) -> None:
    page.controls["prompt"] = gr.Textbox(
        page.defaults.prompt,
        label="Prompt",
        info="<lora:name:strength>, also te= unet= lbw= start= stop= step= and 0@0,1@0.4. Ctrl+Up and Ctrl+Down change the "
        "strength under the cursor, Shift+Enter composes.",
        lines=2,
        max_length=5000,
        elem_id="prompt",
    )
    page.controls["negative"] = gr.Textbox(page.defaults.negative, label="Negative prompt", max_length=5000)


def _adding(page: Page) -> dict[str, Any]:
    """The controls, by name."""
    with gr.Row(equal_height=True):
        add = gr.Dropdown(
            list(page.actions.studio.catalog.loras), value=None, label="Add a LoRA", elem_id="add", min_width=120
        )
        with gr.Column(min_width=120):
            find = gr.Button("Find LoRAs for the prompt", size="sm", elem_id="find")
            upload = gr.UploadButton(
                "Upload a LoRA", file_types=[".safetensors"], type="filepath", size="sm", elem_id="upload"
            )
    why = gr.Markdown("", elem_id="why", elem_classes="status")
    return {"find": find, "add": add, "upload": upload, "why": why}


def _settings(page: Page) -> Any:
    d, catalog = page.defaults, page.actions.studio.catalog
    with gr.Accordion("Settings", open=True):
        with gr.Row():
            with gr.Column(min_width=120):
                page.controls["seed"] = gr.Number(d.seed, label="Seed", precision=0, minimum=0, elem_id="seed")
                new = gr.Button("New seed", size="sm", elem_id="new-seed")
                new.click(lambda: random.randrange(2**32), None, page.controls["seed"], queue=False, **PRIVATE)
            page.controls["steps"] = gr.Slider(1, 150, d.steps, step=1, label="Steps", elem_id="steps")
        with gr.Row():
            page.controls["guidance"] = gr.Slider(0, 20, d.guidance, step=0.1, label="Guidance")
            count = gr.Slider(1, 16, 1, step=1, label="Pictures", info="seeds follow one another", elem_id="count")
        with gr.Row():
            page.controls["width"] = gr.Number(d.width, label="Width", precision=0)
            page.controls["height"] = gr.Number(d.height, label="Height", precision=0)
        with gr.Row():
            page.controls["sampler"] = gr.Dropdown(["default", *SAMPLERS], value="default", label="Sampler")
            choices = ["auto", *UNTRAINED, *catalog.gates]
            page.controls["gates"] = gr.Dropdown(
                choices,
                value=d.gates,
                label="Gates",
                info="auto: trained ones for these LoRAs, else the sum",
                elem_id="gates",
            )
    return count


def _composed(page: Page) -> Callable[..., Iterator[Any]]:
    @say_while
    def compose(request: gr.Request, *values: Any) -> Iterator[Any]:
        *given, count = values
        with page.stops.job(session(request)) as stopped:
            for state in page.actions.compose(page.recipe(*given), int(count), stopped):
                last = state.made[-1].recipe.to_dict() if state.made else None
                now = gr.skip() if state.preview is None else state.preview
                yield str(state), now, shown(state.made), last
            if len(state.made) < int(count):
                yield f"stopped after {len(state.made)} of {int(count)} pictures", gr.skip(), gr.skip(), gr.skip()

    return compose


def _typed(page: Page) -> Callable[..., Any]:
    @say
    def typed(prompt: str, cards: list[Card]) -> Any:
        new = cards_of(prompt, cards, page.actions.studio.catalog.loras)
        return (gr.skip(), gr.skip()) if new == cards else (new, fresh(new))

    return typed


def _connect_adding(page: Page, *, find: Any, add: Any, upload: Any, why: Any) -> None:
    catalog, prompt = page.actions.studio.catalog, page.controls["prompt"]
    changed = [prompt, page.cards, page.shown]

    def put(names: Iterable[str], text: str, cards: list[Card]) -> Any:
        for name in names:
            text, cards = added(text, cards, name, catalog.loras)
        return text, cards, fresh(cards)

    @say
    def chosen(name: str | None, text: str, cards: list[Card]) -> Any:
        return (*put([name] if name else [], text, cards), None)

    @say
    def found(text: str, cards: list[Card]) -> Any:
        plain = parse(text, catalog.loras).text
        hits = page.actions.find(plain)
        words = "; ".join(f"**{plainly(hit.name)}**: {plainly(hit.why)}" for hit in hits)
        return (*put([hit.name for hit in hits], text, cards), words or "The prompt asks for none of the LoRAs here.")

    @say
    def uploaded(path: str, text: str, cards: list[Card]) -> Any:
        name = page.actions.add_file(Path(path))
        return (*put([name], text, cards), gr.update(choices=list(catalog.loras)))

    find.click(found, [prompt, page.cards], [*changed, why], **QUEUE, **PRIVATE)
    add.input(chosen, [add, prompt, page.cards], [*changed, add], **PRIVATE)
    upload.upload(uploaded, [upload, prompt, page.cards], [*changed, add], **PRIVATE)
