"""The mixer: shows a card per LoRA, and keeps the prompt, the cards and their fields in sync."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mole_diffusers.app.fields import CARD
from mole_diffusers.app.mixer_cards import MixerCard, edit, fields_of, newest, triggers_in, with_tag, with_triggers
from mole_diffusers.app.page import ORDERED, Page, Values
from mole_diffusers.app.sentences import errors_to, markdown
from mole_diffusers.app.style import figure
from mole_diffusers.binding.regions import AUTO

LAST: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", **ORDERED, "api_visibility": "private"}
EDITABLE: dict[str, Any] = {"interactive": True}  # Gradio disables redrawn components by default
SMALL: dict[str, Any] = {"height": 56, "min_width": 56, "scale": 0, "show_label": False, "container": False, "buttons": [],
                         "elem_classes": "thumb"}  # fmt: skip
CHIPS: dict[str, Any] = {"container": False, "min_width": 80, "elem_classes": "chips"}
PLACES = {"own": "in a place of its own", "silent": "nowhere"}  # as the page says them
LOW, HIGH = -1.0, 2.0  # range of the slider; you can type any number


def build(page: Page) -> None:
    """Lay out the cards. They are redrawn whenever `page.shown` changes."""

    @gr.render(inputs=[page.shown, page.controls["prompt"]], triggers=[page.shown.change], **ORDERED)
    def draw(shown: dict[str, Any], prompt: str) -> None:
        if not shown["cards"]:
            gr.Markdown("No LoRA yet: write a prompt and find the LoRAs for it, or add one.")
        for card in shown["cards"]:
            _card(page, card, prompt)

    acts = gr.Markdown(elem_id="acts")

    @errors_to(acts)
    def explained(prompt: str) -> Values:
        lines = [
            f"- **{markdown(name)}** acts {PLACES.get(role.place, markdown(role.place))}: {markdown(role.why)}"
            for name, role in page.actions.roles(prompt).items()
        ]
        return {acts: "\n".join(lines)}

    prompt = page.controls["prompt"]
    gr.on([page.shown.change, prompt.blur, prompt.submit], explained, prompt, acts, **LAST)


def _card(page: Page, card: MixerCard, prompt: str) -> None:
    """The card of one LoRA: switch, strength, trigger words; folded if unused, the rest of its tag and its file's facts."""
    name, report = card["name"], page.actions.report(card["name"])
    typed = fields_of(card, page.actions.studio.catalog.loras)

    def field(key: str, **options: Any) -> Any:
        return CARD[key](value=typed[key], min_width=90, **EDITABLE, **options)

    with gr.Column(elem_classes=["card", f"c{card['colour']}"]):
        with gr.Row(elem_classes="head"):
            if (thumbnail := page.actions.thumbnail(name)) is not None:
                figure(thumbnail, label=f"what {name} looks like", **SMALL)
            parts: dict[str, Any] = {"on": gr.Checkbox(card["on"], label=name, container=False, min_width=80, **EDITABLE)}
            triggers = report["triggers"]
            present = triggers_in(prompt, triggers)
            ticked = gr.State(present)
            chips = gr.CheckboxGroup(
                triggers, value=present, visible=bool(triggers), label="Trigger words", **CHIPS, **EDITABLE
            )
            remove = gr.Button(f"Remove {name}", size="sm", min_width=90, scale=0)
        with gr.Row(elem_classes="strength"):
            label = f"Strength of {name}"
            shown = slider_update(typed["unet"])
            parts["slider"] = gr.Slider(LOW, HIGH, step=0.05, label=label, buttons=[], scale=3, min_width=160, **shown)
            parts["unet"] = field("unet")
        own = [key for key in ("word", "lbw", "start", "stop") if typed[key]]
        is_set = own or typed["region"] != AUTO or typed["te"] != typed["unet"] or report["problem"]
        with gr.Accordion("Words, place, blocks, steps", open=bool(is_set), elem_classes="rest"):
            with gr.Row(elem_classes="binding"):
                of_file = f", {', '.join(triggers[:4])}" if triggers else ""
                parts["word"] = field("word", choices=triggers, info=f"none: those of its file{of_file}")
                parts["region"] = field("region")
            with gr.Row():
                parts |= {key: field(key) for key in ("te", "lbw", "start", "stop")}
            gr.Markdown(_facts(report, page.actions.studio.misfit(name)), elem_classes="facts")
    _connect_fields(page, card, parts)
    _connect_prompt(page, name, remove=remove, chips=chips, ticked=ticked)


def slider_update(strength: str) -> dict[str, Any]:
    """How the slider shows a strength. It is disabled if the strength is a list over the steps."""
    constant = "@" not in strength
    return {"value": min(max(float(strength), LOW), HIGH) if constant else HIGH, "interactive": constant}


def _facts(report: dict[str, Any], misfit: str) -> str:
    """The file's report as Markdown; `misfit` says why it is not for this base."""
    if report["problem"]:
        return f"**refused:** {markdown(report['problem'])}"
    fits = "for this base" if report["matched"] else "not for this base"
    return (
        f"{markdown(misfit) or fits}, matched **{report['matched']} of {report['layers']}** layers, "
        f"rank {report['ranks']}, hash {report['sha256'][:12]}"
    )


def _connect_fields(page: Page, card: MixerCard, parts: dict[str, Any]) -> None:
    """Send a change of the switch, the slider or a field to the prompt, the cards and the other fields.

    Only changed values are read from the card, since the rest may be older than its tag. And only values that must change
    are written to it, since the visitor may be typing in the rest.
    """
    known, name = page.actions.studio.catalog.loras, card["name"]

    def shows(card: MixerCard) -> dict[str, Any]:
        typed = fields_of(card, known)
        return {"on": card["on"], "slider": slider_update(typed["unet"])["value"], **typed}

    seen = gr.State(shows(card))  # the values that this card shows

    @errors_to(page.problem)
    def write(seen_now: dict[str, Any], text: str, cards: list[MixerCard], rewrites: list[str], *values: Any) -> Values:
        given = dict(zip(parts, values, strict=True))
        edits = {key: value for key, value in given.items() if (value or None) != (seen_now[key] or None)}
        at = next((i for i, one in enumerate(cards) if one["name"] == name), None)
        if at is None or not edits:  # the card was removed meanwhile, or nothing was changed
            return {}
        is_moved = "slider" in edits
        if is_moved:
            edits["te"] = edits["unet"] = str(edits.pop("slider"))
        rewritten, cards = edit(newest(text, rewrites), cards, name, known, **{"on": cards[at]["on"], **edits})
        shown = shows(cards[at])
        written = {parts[key]: value for key, value in shown.items() if key != "slider" and value != given[key]}
        if not is_moved and shown["unet"] != seen_now["unet"]:
            written[parts["slider"]] = gr.update(**slider_update(shown["unet"]))
        return page.rewrite(text, rewritten, rewrites) | written | {page.cards: cards, seen: shown}

    now = [seen, *page.written]
    events = [parts["slider"].release, *(parts[key].input for key in ("on", "lbw", "word", "region"))]
    for key in ("unet", "te", "start", "stop"):
        events += [parts[key].submit, parts[key].blur]
    gr.on(events, write, [*now, *parts.values()], [*now, *parts.values(), page.problem], **LAST)


def _connect_prompt(page: Page, name: str, *, remove: Any, chips: Any, ticked: Any) -> None:
    """Let removing the card and switching trigger words change the prompt."""
    catalog, prompt = page.actions.studio.catalog, page.controls["prompt"]

    @errors_to(page.problem)
    def removed(text: str, cards: list[MixerCard], rewrites: list[str]) -> Values:
        left = [other for other in cards if other["name"] != name]
        rewritten = page.rewrite(text, with_tag(newest(text, rewrites), name, None, catalog.loras), rewrites)
        return rewritten | page.redraw(left)

    @errors_to(page.problem)
    def switched(before: list[str], chosen: list[str], text: str, rewrites: list[str]) -> Values:
        new = with_triggers(newest(text, rewrites), before, chosen, catalog.loras)
        return page.rewrite(text, new, rewrites) | {ticked: chosen}

    chips.input(switched, [ticked, chips, prompt, page.rewrites], [prompt, page.rewrites, ticked, page.problem], **LAST)
    remove.click(removed, page.written, [*page.written, page.shown, page.problem], **LAST)
