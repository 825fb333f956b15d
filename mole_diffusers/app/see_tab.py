"""The See tab: the same seed by every arm, what the gates did, and gates set by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from mole_diffusers.app.actions import Look, Progress
from mole_diffusers.app.cards import Card, cards_of, locks_of, with_preset
from mole_diffusers.app.compose_tab import fresh
from mole_diffusers.app.page import PRIVATE, QUEUE, Page, gallery, say, say_while, session
from mole_diffusers.plan import PRESETS
from mole_diffusers.prompt_syntax import parse

SHOWN = ("sum", "gates")  # what the slider compares at first


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    with gr.Row():
        compare = gr.Button("Compare at this seed", variant="primary", elem_id="compare")
        look = gr.Button("Watch the gates", variant="primary", elem_id="look")
        cancel = gr.Button("Cancel", elem_id="see-cancel")
    status = gr.Markdown("", elem_id="see-status")
    with gr.Row(elem_classes="phone-column"):
        _comparison(page, compare, status)
        _watching(page, look, status)

    def stop(request: gr.Request) -> str:
        return "stopping" if page.stops.stop(session(request)) else "nothing is running"

    cancel.click(stop, None, status, queue=False, **PRIVATE)


def _comparison(page: Page, compare: Any, status: Any) -> None:
    with gr.Column():
        arms = gr.Gallery(
            label="The same seed", format="png", columns=5, object_fit="contain", elem_classes="pixel", elem_id="arms"
        )
        slider = gr.ImageSlider(
            label="Left and right", format="png", interactive=False, elem_classes="pixel", elem_id="slider"
        )
        with gr.Row():
            left = gr.Dropdown(list(SHOWN), value=SHOWN[0], label="Left", elem_id="left")
            right = gr.Dropdown(list(SHOWN), value=SHOWN[1], label="Right", elem_id="right")
        found = gr.State({})
    outputs = [status, arms, slider, left, right, found]
    compare.click(_compared(page), page.inputs, outputs, **QUEUE, **PRIVATE)
    for side in (left, right):
        side.input(_sides, [found, left, right], slider, **PRIVATE)


def _sides(found: dict[str, str], left: str, right: str) -> Any:
    return (found[left], found[right]) if left in found and right in found else gr.skip()


def _compared(page: Page) -> Callable[..., Iterator[Any]]:
    @say_while
    def compared(*values: Any, request: gr.Request) -> Iterator[Any]:
        with page.stops.job(session(request)) as stopped:
            for state in page.actions.compare(page.recipe(*values), stopped):
                found = {one.label: str(one.path) for one in state.made}
                choices = gr.update(choices=list(found))
                yield str(state), gallery(state.made), _sides(found, *SHOWN), choices, choices, found

    return compared


def _watching(page: Page, look: Any, status: Any) -> None:
    with gr.Column():
        heat = gr.Image(label="Weights by block and step", format="png", interactive=False, elem_id="heat")
        with gr.Row():
            shares = gr.Image(label="Share over the steps", format="png", interactive=False, elem_id="shares")
        places = gr.Gallery(label="Where each LoRA acts", format="png", columns=3, object_fit="contain", elem_id="places")
        block, weights, held = _by_hand(page)
        labels = gr.State({})
    outputs = [status, heat, shares, places, block, labels]
    look.click(_looked(page), page.inputs, outputs, **QUEUE, **PRIVATE)
    locked = [block, weights, labels, page.controls["prompt"], page.locks]
    _connect_by_hand(page, locked, held)


def _looked(page: Page) -> Callable[..., Iterator[Any]]:
    @say_while
    def looked(*values: Any, request: gr.Request) -> Iterator[Any]:
        nothing = [gr.skip()] * 5
        with page.stops.job(session(request)) as stopped:
            for event in page.actions.look(page.recipe(*values), stopped):
                if isinstance(event, Progress):
                    yield [str(event), *nothing]
                elif isinstance(event, Look):
                    spots = [(image, label) for label, image in event.places.items()]
                    blocks = gr.update(choices=list(event.labels), value=next(iter(event.labels)))
                    yield [_means(event), event.heat, event.shares, spots, blocks, event.labels]

    return looked


def _means(look: Look) -> str:
    """Each LoRA's mean weight in words, for those who do not see the picture."""
    rows = list(look.weights.values())
    means = [sum(row[n] for row in rows) / len(rows) for n in range(len(look.experts))]
    return "mean weight: " + ", ".join(f"{name} {mean:.2f}" for name, mean in zip(look.experts, means, strict=True))


def _by_hand(page: Page) -> tuple[Any, Any, dict[str, Any]]:
    with gr.Accordion("Change it by hand", open=True):
        with gr.Row():
            block = gr.Dropdown([], label="Block", info="watch the gates first", elem_id="block")
            weights = gr.Textbox(label="Weights", placeholder="fox=1, ink=0.2", max_length=500, elem_id="weights")
        with gr.Row():
            lock = gr.Button("Set", size="sm", elem_id="lock")
            free = gr.Button("Free all", size="sm", elem_id="free")
        held = gr.JSON(label="Set by hand", elem_id="held")
        with gr.Row():
            name = gr.Dropdown(list(page.actions.studio.shelf.loras), value=None, label="Blocks of one LoRA")
            choices = ["", *PRESETS, "ALL0.5"]
            preset = gr.Dropdown(choices, value="", label="lbw", allow_custom_value=True, info="a preset, or numbers")
    return block, weights, {"lock": lock, "free": free, "held": held, "name": name, "preset": preset}


def _connect_by_hand(page: Page, locked: list[Any], held: dict[str, Any]) -> None:
    shelf, prompt = page.actions.studio.shelf, page.controls["prompt"]

    @say
    def lock(block: str | None, weights: str, labels: dict[str, str], text: str, locks: dict) -> Any:
        if block not in labels:
            raise ValueError("watch the gates first, then choose a block")
        names = [tag.name for tag in parse(text, shelf.loras).tags]
        changed = {**locks, labels[block]: locks_of(weights, names)}
        return changed, changed

    @say
    def preset(name: str | None, chosen: str, text: str, cards: list[Card]) -> Any:
        text = with_preset(text, name or "", chosen, shelf.loras)
        new = cards_of(text, cards, shelf.loras)
        return text, new, fresh(new)

    shown = [page.locks, held["held"]]
    held["lock"].click(lock, locked, shown, **PRIVATE)
    held["free"].click(lambda: ({}, {}), None, shown, **PRIVATE)
    inputs = [held["name"], held["preset"], prompt, page.cards]
    held["preset"].input(preset, inputs, [prompt, page.cards, page.shown], **PRIVATE)
