"""The mixer: a card per LoRA, drawn from the cards' state."""

from __future__ import annotations

import re
from typing import Any

import gradio as gr

from mole_diffusers.app.cards import FIELDS, Card, fields_of, moved, set_card, with_fields, with_words, without
from mole_diffusers.app.page import PRIVATE, Page, fresh, say
from mole_diffusers.studio.block_weights import PRESETS

QUIET: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
OPEN: dict[str, Any] = {"interactive": True}  # Gradio shuts what is drawn anew, unless it is told not to
FIELD: dict[str, Any] = {"min_width": 90, **OPEN}
LOW, HIGH = -1.0, 2.0  # of the slider; what is typed may be any number


def build(page: Page) -> None:
    """The cards, drawn anew when `page.shown` changes."""

    @gr.render(inputs=[page.shown, page.controls["prompt"]], triggers=[page.shown.change])
    def draw(shown: dict[str, Any], prompt: str) -> None:
        if not shown["cards"]:
            gr.Markdown("No LoRA yet: write a prompt and let them be found, or add one.")
        for card in shown["cards"]:
            _card(page, card, prompt)


def _card(page: Page, card: Card, prompt: str) -> None:
    """One LoRA: switch, strength, trigger words, what its file says, and the rest of its tag."""
    name, report = card["name"], page.actions.report(card["name"])
    typed = fields_of(card, page.actions.studio.catalog.loras)
    with gr.Column(elem_classes=["card", f"c{card['colour']}"]):
        with gr.Row(elem_classes="head"):
            _thumbnail(page, name)
            on = gr.Checkbox(card["on"], label=name, container=False, min_width=80, **OPEN)
            remove = gr.Button(f"Remove {name}", size="sm", min_width=90, scale=0)
        with gr.Row(elem_classes="strength"):
            label = f"Strength of {name}"
            shown = slid(typed["unet"])
            slider = gr.Slider(LOW, HIGH, step=0.05, label=label, buttons=[], scale=3, min_width=160, **shown)
            unet = gr.Textbox(typed["unet"], label="Any number, or 0@0,1@0.4", max_length=500, elem_classes="any", **FIELD)
        words = report["triggers"]
        said = [word for word in words if word in prompt]
        chips = gr.CheckboxGroup(words, value=said, label="Trigger words", visible=bool(words), **OPEN)
        gr.Markdown(_facts(report), elem_classes="facts")
        fields = {"unet": unet, **_rest(typed)}
    _connect(page, card, on=on, slider=slider, fields=fields)
    _connect_words(page, name, remove=remove, chips=chips)


def _thumbnail(page: Page, name: str) -> None:
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


def _rest(typed: dict[str, str]) -> dict[str, Any]:
    """What few tags have, by field."""
    used = typed["te"] != typed["unet"] or any(typed[key] for key in ("lbw", "start", "stop"))
    with gr.Accordion("Text encoder, blocks, steps", open=used, elem_classes="rest"), gr.Row():
        presets = ["", *PRESETS, "ALL0.5"]
        return {
            "te": gr.Textbox(typed["te"], label="Text encoder (te)", max_length=500, **FIELD),
            "lbw": gr.Dropdown(presets, value=typed["lbw"], label="Blocks (lbw)", allow_custom_value=True, **FIELD),
            "start": gr.Textbox(typed["start"], label="From step (start)", max_length=10, **FIELD),
            "stop": gr.Textbox(typed["stop"], label="To step (stop)", max_length=10, **FIELD),
        }


def slid(strength: str) -> dict[str, Any]:
    """A strength as the slider shows it; it cannot move what is a list over the steps."""
    steady = "@" not in strength
    return {"value": min(max(float(strength), LOW), HIGH) if steady else HIGH, "interactive": steady}


def _facts(report: dict[str, Any]) -> str:
    """The load report as Markdown; what comes from the file is escaped, so that it stays text and fetches nothing."""
    if report["problem"]:
        return f"**refused:** {plainly(report['problem'])}"
    return (
        f"for **{plainly(report['base'])}**, matched **{report['matched']} of {report['layers']}** layers, "
        f"rank {report['ranks']}, {plainly(report['format'])} keys, hash {report['sha256'][:12]}"
    )


def plainly(text: str) -> str:
    """Text as Markdown that shows exactly it."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|<>~$:/&-])", r"\\\1", " ".join(text.split()))


def _connect(page: Page, card: Card, *, on: Any, slider: Any, fields: dict[str, Any]) -> None:
    """Prompt, cards and fields in step with a change of one of them."""
    known, prompt, name = page.actions.studio.catalog.loras, page.controls["prompt"], card["name"]

    def changed(new: Card, text: str, cards: list[Card]) -> Any:
        typed = fields_of(new, known)
        return (*set_card(text, cards, new, known), gr.update(**slid(typed["unet"])), *(typed[key] for key in FIELDS))

    def mine(cards: list[Card], there: bool) -> Card:
        return {**next((one for one in cards if one["name"] == name), card), "on": there}

    @say
    def slide(value: float, there: bool, text: str, cards: list[Card]) -> Any:
        return changed(moved(mine(cards, there), value, known), text, cards)

    @say
    def write(there: bool, text: str, cards: list[Card], *values: str | None) -> Any:
        now, given = mine(cards, there), {key: value or "" for key, value in zip(FIELDS, values, strict=True)}
        before = fields_of(now, known)
        if before["te"] == before["unet"] == given["te"]:  # one strength for both parts stays one
            given["te"] = given["unet"]
        return changed(with_fields(now, given, known), text, cards)

    boxes = [fields[key] for key in FIELDS]
    outputs = [prompt, page.cards, slider, *boxes]
    slider.release(slide, [slider, on, prompt, page.cards], outputs, **QUIET)
    events = [on.input, fields["lbw"].input]
    for key in ("unet", "te", "start", "stop"):
        events += [fields[key].submit, fields[key].blur]
    gr.on(events, write, [on, prompt, page.cards, *boxes], outputs, **QUIET)


def _connect_words(page: Page, name: str, *, remove: Any, chips: Any) -> None:
    catalog, prompt = page.actions.studio.catalog, page.controls["prompt"]

    @say
    def gone(text: str, cards: list[Card]) -> Any:
        left = [other for other in cards if other["name"] != name]
        return without(text, name, catalog.loras), left, fresh(left)

    @say
    def worded(chosen: list[str], text: str) -> str:
        return with_words(text, catalog.expert(name).triggers, chosen, catalog.loras)

    chips.input(worded, [chips, prompt], prompt, **QUIET)
    remove.click(gone, [prompt, page.cards], [prompt, page.cards, page.shown], **QUIET)
