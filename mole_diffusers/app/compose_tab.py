"""The Compose tab: a prompt, a card per LoRA, pictures."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app.cards import Card, cards_of, set_card, with_words, without
from mole_diffusers.app.page import BUTTONS, PRIVATE, QUEUE, Page, gallery, say, say_while, session
from mole_diffusers.drawing import SAMPLERS
from mole_diffusers.prompt_syntax import parse
from mole_diffusers.shelf import UNTRAINED


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
            _cards(page)
        with gr.Column(scale=4):
            preview = gr.Image(
                label="Now", format="png", interactive=False, height=260, buttons=[], elem_classes="pixel", elem_id="now"
            )
            pictures = gr.Gallery(
                label="Pictures",
                format="png",
                columns=2,
                height="auto",
                object_fit="contain",
                buttons=BUTTONS,
                interactive=False,
                elem_classes="pixel",
                elem_id="pictures",
            )
            count = _settings(page)
    made = [status, preview, pictures, page.made]
    prompt = page.controls["prompt"]
    start = [*page.inputs, count]
    gr.on([compose.click, prompt.submit], _composed(page), start, made, **QUEUE, **PRIVATE)
    cancel.click(_cancelled(page), None, status, queue=False, **PRIVATE)
    for event in (prompt.blur, prompt.submit):
        event(_typed(page), [prompt, page.cards], [page.cards, page.shown], show_progress="hidden", **PRIVATE)
    _connect_adding(page, *adding)


def opened(page: Page) -> Callable[[], tuple[list[Card], dict[str, Any]]]:
    """The cards that a fresh page shows."""

    def cards() -> tuple[list[Card], dict[str, Any]]:
        found = cards_of(page.defaults.prompt, [], page.actions.studio.shelf.loras)
        return found, fresh(found)

    return cards


def fresh(cards: list[Card]) -> dict[str, Any]:
    """Cards to draw anew, also where they are what was drawn last."""
    return {"cards": cards, "at": time.monotonic_ns()}


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


def _adding(page: Page) -> tuple[Any, Any, Any]:
    with gr.Row(equal_height=True):
        add = gr.Dropdown(
            list(page.actions.studio.shelf.loras), value=None, label="Add a LoRA", elem_id="add", min_width=120
        )
        with gr.Column(min_width=120):
            find = gr.Button("Find LoRAs for the prompt", size="sm", elem_id="find")
            upload = gr.UploadButton(
                "Upload a LoRA", file_types=[".safetensors"], type="filepath", size="sm", elem_id="upload"
            )
    return find, add, upload


def _settings(page: Page) -> Any:
    d, shelf = page.defaults, page.actions.studio.shelf
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
            choices = ["auto", *UNTRAINED, *shelf.gates]
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
                shown = gr.skip() if state.preview is None else state.preview
                yield str(state), shown, gallery(state.made), last
            if len(state.made) < int(count):
                yield f"stopped after {len(state.made)} of {int(count)} pictures", gr.skip(), gr.skip(), gr.skip()

    return compose


def _cancelled(page: Page) -> Callable[..., str]:
    def cancel(request: gr.Request) -> str:
        return "stopping" if page.stops.stop(session(request)) else "nothing is running"

    return cancel


def _typed(page: Page) -> Callable[..., Any]:
    @say
    def typed(prompt: str, cards: list[Card]) -> Any:
        new = cards_of(prompt, cards, page.actions.studio.shelf.loras)
        return (gr.skip(), gr.skip()) if new == cards else (new, fresh(new))

    return typed


def _connect_adding(page: Page, find: Any, add: Any, upload: Any) -> None:
    shelf, prompt = page.actions.studio.shelf, page.controls["prompt"]
    changed = [prompt, page.cards, page.shown]

    def added(names: list[str], text: str, cards: list[Card]) -> Any:
        for name in names:
            if name not in [card["name"] for card in cards if card["on"]]:
                text, cards = set_card(text, cards, {"name": name, "on": True, "strength": 1.0}, shelf.loras)
        return text, cards, fresh(cards)

    @say
    def chosen(name: str | None, text: str, cards: list[Card]) -> Any:
        return (*added([name] if name else [], text, cards), None)

    @say
    def found(text: str, cards: list[Card]) -> Any:
        names = page.actions.find(parse(text, shelf.loras).text)
        if not names:
            gr.Info("No LoRA here is named in the prompt.")
        return added(names, text, cards)

    @say
    def uploaded(path: str, text: str, cards: list[Card]) -> Any:
        name = page.actions.add_file(Path(path))
        return (*added([name], text, cards), gr.update(choices=list(shelf.loras)))

    find.click(found, [prompt, page.cards], changed, **PRIVATE)
    add.input(chosen, [add, prompt, page.cards], [*changed, add], **PRIVATE)
    upload.upload(uploaded, [upload, prompt, page.cards], [*changed, add], **PRIVATE)


def _cards(page: Page) -> None:
    @gr.render(inputs=[page.shown, page.controls["prompt"]], triggers=[page.shown.change])
    def draw(shown: dict[str, Any], prompt: str) -> None:
        cards = shown["cards"]
        if not cards:
            gr.Markdown("No LoRA yet: write a prompt and let them be found, or add one.")
        names = sorted(card["name"] for card in cards)
        for card in cards:
            _card(page, card, prompt, colour=names.index(card["name"]) % 8)


def _card(page: Page, card: Card, prompt: str, *, colour: int) -> None:
    """One LoRA: switch, strength, trigger words, what its file says."""
    name, report = card["name"], page.actions.report(card["name"])
    with gr.Column(elem_classes=["card", f"c{colour}"]):
        with gr.Row(elem_classes="head"):
            if (thumb := page.actions.thumbnail(name)) is not None:
                gr.Image(
                    thumb,
                    label=f"what {name} looks like",
                    show_label=False,
                    container=False,
                    interactive=False,
                    height=56,
                    buttons=[],
                    elem_classes=["thumb", "pixel"],
                    format="png",
                    min_width=56,
                    scale=0,
                )
            on = gr.Checkbox(card["on"], label=name, container=False, min_width=80)
            remove = gr.Button(f"Remove {name}", size="sm", min_width=90, scale=0)
        with gr.Row(elem_classes="strength"):
            shown = min(max(card["strength"], -1), 2)
            strength = gr.Slider(-1, 2, shown, step=0.05, label=f"Strength of {name}", buttons=[], scale=3, min_width=160)
            number = gr.Number(card["strength"], label="Any number", step=0.05, min_width=90, scale=1)
        words = report["triggers"]
        chips = gr.CheckboxGroup(words, value=[w for w in words if w in prompt], label="Trigger words", visible=bool(words))
        gr.Markdown(_facts(report), elem_classes="facts")
    _connect_card(page, card, on=on, strength=strength, number=number, remove=remove, chips=chips)


def _facts(report: dict[str, Any]) -> str:
    """The load report as Markdown; what comes from the file is escaped, so that it stays text and fetches nothing."""
    if report["problem"]:
        return f"**refused:** {_plain(report['problem'])}"
    return (
        f"for **{_plain(report['base'])}**, matched **{report['matched']} of {report['layers']}** layers, "
        f"rank {report['ranks']}, {_plain(report['format'])} keys, hash {report['sha256'][:12]}"
    )


def _plain(text: str) -> str:
    """Text as Markdown that shows exactly it."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|<>~$:/&-])", r"\\\1", " ".join(text.split()))


def _connect_card(page: Page, card: Card, *, on: Any, strength: Any, number: Any, remove: Any, chips: Any) -> None:
    shelf, prompt, name = page.actions.studio.shelf, page.controls["prompt"], card["name"]

    @say
    def moved(value: float, there: bool, text: str, cards: list[Card]) -> Any:
        if value is None:
            raise ValueError(f"the strength of {name!r} must be a number")
        new = {"name": name, "on": there, "strength": float(value)}
        return (*set_card(text, cards, new, shelf.loras), float(value), min(max(float(value), -1), 2))

    @say
    def gone(text: str, cards: list[Card]) -> Any:
        left = [other for other in cards if other["name"] != name]
        return without(text, name, shelf.loras), left, fresh(left)

    @say
    def worded(chosen: list[str], text: str) -> str:
        return with_words(text, shelf.expert(name).triggers, chosen, shelf.loras)

    outputs = [prompt, page.cards, number, strength]
    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    strength.release(moved, [strength, on, prompt, page.cards], outputs, **quiet)
    number.submit(moved, [number, on, prompt, page.cards], outputs, **quiet)
    number.blur(moved, [number, on, prompt, page.cards], outputs, **quiet)
    on.input(moved, [number, on, prompt, page.cards], outputs, **quiet)
    chips.input(worded, [chips, prompt], prompt, **quiet)
    remove.click(gone, [prompt, page.cards], [prompt, page.cards, page.shown], **quiet)
