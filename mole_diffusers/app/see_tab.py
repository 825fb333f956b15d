"""The See tab: the same seed by every arm, what the gates did, and gates set by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from mole_diffusers.app.actions import Progress
from mole_diffusers.app.cards import Card, cards_of, locks_of, shades, with_preset
from mole_diffusers.app.looking import Look
from mole_diffusers.app.page import (
    BUTTONS,
    PRIVATE,
    QUEUE,
    Page,
    fresh,
    gallery,
    picture,
    say,
    say_while,
    session,
    shown,
    stoppable,
)
from mole_diffusers.studio.block_weights import PRESETS
from mole_diffusers.studio.prompt_syntax import parse
from mole_diffusers.studio.render import MERGES

SHOWN = ("sum", "gates")  # what the slider compares at first
NOTHING = "nothing: every gate decides"


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    with gr.Row():
        compare = gr.Button("Compare at this seed", variant="primary", elem_id="compare")
        look = gr.Button("Watch the gates", variant="primary", elem_id="look")
        cancel = gr.Button("Cancel", elem_id="see-cancel")
    status = gr.Markdown("", elem_id="see-status", elem_classes="status")
    with gr.Row(elem_classes="phone-column"):
        works = [_comparison(page, compare, status), _watching(page, look, status)]
    stoppable(page, cancel, status, works)


def _comparison(page: Page, compare: Any, status: Any) -> Any:
    with gr.Column():
        merges = gr.Dropdown(
            MERGES,
            value=[],
            multiselect=True,
            label="Merges to compare as well",
            info="training-free, one LoRA from all",
            elem_id="merges",
        )
        arms = gallery("The same seed", columns=3, elem_id="arms")
        slider = gr.ImageSlider(
            label="Left and right", format="png", interactive=False, buttons=BUTTONS, elem_classes="pixel", elem_id="slider"
        )
        with gr.Row():
            left = gr.Dropdown(list(SHOWN), value=SHOWN[0], label="Left", elem_id="left")
            right = gr.Dropdown(list(SHOWN), value=SHOWN[1], label="Right", elem_id="right")
        found = gr.State({})
    outputs = [status, arms, slider, left, right, found]
    for side in (left, right):
        side.input(_sides, [found, left, right], slider, **PRIVATE)
    return compare.click(_compared(page), [*page.inputs, merges], outputs, **QUEUE, **PRIVATE)


def _sides(found: dict[str, str], left: str, right: str) -> Any:
    return (found[left], found[right]) if left in found and right in found else gr.skip()


def _compared(page: Page) -> Callable[..., Iterator[Any]]:
    @say_while
    def compared(request: gr.Request, *values: Any) -> Iterator[Any]:
        *given, merges = values
        with page.stops.job(session(request)) as stopped:
            for state in page.actions.compare(page.recipe(*given), stopped, merges):
                found = {one.label: str(one.path) for one in state.made}
                choices = gr.update(choices=list(found))
                yield str(state), shown(state.made), _sides(found, *SHOWN), choices, choices, found

    return compared


def _watching(page: Page, look: Any, status: Any) -> Any:
    with gr.Column():
        heat = picture("Weights by block and step", elem_id="heat")
        shares = picture("Share over the steps", elem_id="shares")
        places = gallery("Where each LoRA acts", columns=3, elem_id="places", pixel=False)
        hand = _by_hand(page)
        labels, seen = gr.State({}), gr.State({})
    outputs = [status, heat, shares, places, labels, seen, hand["block"]]
    _connect_by_hand(page, hand, labels, seen)
    return look.click(_looked(page), [*page.inputs, page.cards], outputs, **QUEUE, **PRIVATE)


def _looked(page: Page) -> Callable[..., Iterator[Any]]:
    @say_while
    def looked(request: gr.Request, *values: Any) -> Iterator[Any]:
        *given, cards = values
        nothing = [gr.skip()] * 6
        with page.stops.job(session(request)) as stopped:
            for event in page.actions.look(page.recipe(*given), stopped, shades(cards)):
                if isinstance(event, Progress):
                    yield [str(event), *nothing]
                elif isinstance(event, Look):
                    spots = [(image, label) for label, image in event.places.items()]
                    rows = event.gates.items()
                    gates = {label: _typed(dict(zip(event.experts, row, strict=True))) for label, row in rows}
                    blocks = gr.update(choices=list(event.labels), value=next(iter(event.labels)))
                    yield [_means(event), event.heat, event.shares, spots, event.labels, gates, blocks]

    return looked


def _means(look: Look) -> str:
    """Each LoRA's mean weight in words, for those who do not see the picture."""
    rows = list(look.weights.values())
    means = [sum(row[n] for row in rows) / len(rows) for n in range(len(look.experts))]
    words = "mean weight: " + ", ".join(f"{name} {mean:.2f}" for name, mean in zip(look.experts, means, strict=True))
    return f"{words}; {look.doubt}" if look.doubt else words


def _by_hand(page: Page) -> dict[str, Any]:
    """The controls, by name."""
    with gr.Accordion("Change it by hand", open=True):
        with gr.Row():
            block = gr.Dropdown([], label="Block", info="watch the gates first", elem_id="block")
            weights = gr.Textbox(label="Weights", info="as they are, to change", placeholder="fox=1, ink=0.2",
                                 max_length=500, elem_id="weights")  # fmt: skip
            scale = gr.Number(1.0, label="Times", info="all of them", step=0.1, min_width=80, elem_id="times")
        with gr.Row():
            lock = gr.Button("Set the block", size="sm", elem_id="lock")
            free = gr.Button("Free all", size="sm", elem_id="free")
        held = gr.Textbox(NOTHING, label="Set by hand", interactive=False, lines=1, max_lines=12, elem_id="held")
        with gr.Row():
            names = list(page.actions.studio.catalog.loras)
            name = gr.Dropdown(names, value=None, label="LoRA", info="whose blocks to scale", elem_id="lbw-name")
            preset = gr.Dropdown(["", *PRESETS, "ALL0.5"], value="", label="Block weights (lbw)", allow_custom_value=True,
                                 info="a preset, or numbers", elem_id="lbw")  # fmt: skip
    found = {"block": block, "weights": weights, "scale": scale, "lock": lock, "free": free, "held": held}
    return found | {"name": name, "preset": preset}


def _connect_by_hand(page: Page, hand: dict[str, Any], labels: Any, seen: Any) -> None:
    """labels: block -> place; seen: block -> the gates that were watched there, as they are typed."""
    catalog, prompt = page.actions.studio.catalog, page.controls["prompt"]

    @say
    def lock(block: str | None, weights: str, scale: float | None, labels: dict, text: str, locks: dict) -> Any:
        if block not in labels:
            raise ValueError("watch the gates first, then choose a block")
        names = [tag.name for tag in parse(text, catalog.loras).tags]
        row = {name: weight * (1.0 if scale is None else scale) for name, weight in locks_of(weights, names).items()}
        changed = {**locks, labels[block]: row}
        return changed, _held(changed, labels)

    @say
    def preset(name: str | None, chosen: str, text: str, cards: list[Card]) -> Any:
        text = with_preset(text, name or "", chosen, catalog.loras)
        new = cards_of(text, cards, catalog.loras)
        return text, new, fresh(new)

    shown = [page.locks, hand["held"]]
    given = [hand["block"], hand["weights"], hand["scale"], labels, prompt, page.locks]
    hand["lock"].click(lock, given, shown, **PRIVATE)
    hand["free"].click(lambda: ({}, NOTHING), None, shown, **PRIVATE)
    hand["block"].change(lambda block, seen: seen.get(block, ""), [hand["block"], seen], hand["weights"], **PRIVATE)
    inputs = [hand["name"], hand["preset"], prompt, page.cards]
    hand["preset"].input(preset, inputs, [prompt, page.cards, page.shown], **PRIVATE)


def _held(locks: dict[str, dict[str, float]], labels: dict[str, str]) -> str:
    """Locks in words, a block a line."""
    names = {place: label for label, place in labels.items()}
    return "\n".join(f"{names.get(place, place)}: {_typed(row)}" for place, row in locks.items())


def _typed(row: dict[str, float]) -> str:
    return ", ".join(f"{name}={weight:.3g}" for name, weight in row.items())
