"""The mixer: shows a card per LoRA, and keeps the prompt, the cards and their fields in sync."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageDraw, ImageFont

from mole_app.studio.prompt_syntax import PAINTED, LoraTag
from mole_app.web.fields import CARD, SWITCH
from mole_app.web.mixer_cards import (
    MixerCard,
    edit,
    fields_of,
    newest,
    parse_named,
    triggers_in,
    with_tag,
    with_triggers,
)
from mole_app.web.page import Page
from mole_app.web.prompt_box import ORDERED
from mole_app.web.sentences import errors_to, markdown
from mole_app.web.side_by_side import SideBySide
from mole_app.web.style import Values, figure
from mole_diffusers.binding import AUTO, EVERY_PLACE, EVERYWHERE, INACTIVE, OWN_PLACE, OWN_TILE, Role

LAST: dict[str, Any] = {"show_progress_on": [], "trigger_mode": "always_last", **ORDERED, "api_visibility": "private"}
EDITABLE: dict[str, Any] = {"interactive": True}  # Gradio disables redrawn components by default
HIDDEN = partial(gr.JSON, visible=False)  # held by the browser, so that an event has what its page shows
SMALL: dict[str, Any] = {"height": 40, "min_width": 40, "scale": 0, "show_label": False, "container": False, "buttons": [],
                         "elem_classes": "thumb"}  # fmt: skip
BARE: dict[str, Any] = {"container": False, "show_label": False}
# As the page says them.
PLACES = {OWN_PLACE: "acts in its own place", OWN_TILE: "acts in its own tile"}
SIDE = 96  # pixels of the picture of a LoRA that has none
LOW, HIGH = -1.0, 2.0  # range of the slider; you can type any number
SEEN = ("prompt", "binding", "width", "height", "controlnet", "ip_adapter")  # fields that decide what a card says
MOST_CHIPS = 8  # trigger words on a card


def build(page: Page, side_by_side: SideBySide) -> None:
    """Lay out the cards. They are redrawn whenever `PromptBox.shown` changes.

    The parts and events of a card have keys, so that they stay the same ones when it is redrawn: what is clicked on a card
    before the page shows the new one would else be sent to an event that is gone.
    """
    shown, said = page.prompt.shown, gr.HTML("", elem_id="roles")

    # The cards as they are by now: one may have been edited since `shown` changed.
    @gr.render(inputs=[shown, *page.prompt.written], triggers=[shown.change], **ORDERED)
    def draw(drawn: dict[str, Any], text: str, cards: list[MixerCard], rewrites: list[str]) -> None:
        if not cards:
            gr.Markdown(
                "No LoRA yet. Browse yours, or let the app find those that the prompt asks for.", elem_classes="hint"
            )
            return
        for n, card in enumerate(cards):
            _card(page, card, n, newest(text, rewrites), str(drawn["at"]))

    def tell(request: gr.Request, visitor: str, drawn: dict[str, Any], *values: Any) -> Values:
        try:
            recipe = page.form.recipe(*values)
            roles = page.actions.loras.roles(recipe)
            offered = side_by_side.of(recipe, roles)
        except (ValueError, FileNotFoundError):  # said below the prompt
            return {said: lines({}, drawn["cards"])} | side_by_side.nothing()
        last = next(reversed(page.visits.drawn(request, visitor)), None)
        regions = last.layout.regions if last and last.layout else {}
        tags = {tag.name: tag for tag in parse_named(recipe.prompt, page.actions.studio.catalog.loras).tags}
        words = {name: sentence(role, stands(regions.get(name)), tags[name]) for name, role in roles.items()}
        return {said: lines(words, drawn["cards"])} | offered

    # Not in `draw`: a page whose cards are just drawn anew could call an event that is gone.
    changes = [page.showing, shown, *(page.form.controls[name] for name in SEEN)]
    given = [page.visits.visitor, shown, *page.form.inputs]
    outputs = [said, *side_by_side.outputs]
    gr.on([each.change for each in changes], tell, given, outputs, trigger_mode="always_last", show_progress="hidden")


def lines(said: Mapping[str, str], cards: Sequence[MixerCard]) -> str:
    """CSS that writes on each card what its LoRA does. All but letters and digits is escaped: files have words, too."""
    rules = []
    for n, card in enumerate(cards):
        words = re.sub(r"\W", lambda char: f"\\{ord(char[0]):06x}", said.get(card["name"], ""))
        rules.append(f'.card.n{n} .rest > button::before {{ content: "{words}"; }}')
    return f"<style>{' '.join(rules)}</style>"


def sentence(role: Role, stood: str = "", tag: LoraTag | None = None) -> str:
    """What one LoRA does, in one line: where it acts, then what calls it, then why.

    Args:
        stood: where it was in the last picture.
        tag: its tag, which may give it a place, or strength 0.
    """
    given = tag.region if tag else ""
    if role.place == INACTIVE:
        return f"Does not act: {'its strength is 0' if tag and tag.is_off else role.why}"
    words = f"“{', '.join(role.words)}”" if role.words else ""
    if role.place == OWN_PLACE and given not in ("", AUTO):
        where = "where you painted" if given == PAINTED else f"in the place you gave it, {given}"
        missing = "" if words else "; the prompt has none of its words"
        return f"Acts {where}{f', on {words}' if words else missing}"
    if role.place == EVERY_PLACE:
        unused = "" if given in ("", AUTO, EVERYWHERE) else f"; its place, {given}, is not used"
        return f"Acts everywhere{f', called by {words}' if words else ''}: {role.why}{unused}"
    place = PLACES.get(role.place, f"acts {role.place}")
    where = f", {stood} in the last picture" if stood and role.place == OWN_PLACE else ""
    return f"{place[:1].upper()}{place[1:]}{f', on {words}' if words else ''}{where}: {role.why}"


def stands(region: Any) -> str:
    """Where the middle of a region [H, W] is: "left", "top right", "in the middle"; "" for none."""
    if region is None or not bool(region.any()):
        return ""
    found = []
    for side, low, high in ((0, "top", "bottom"), (1, "left", "right")):
        weight = region.float().sum(1 - side)
        at = float((weight * torch.arange(len(weight))).sum() / weight.sum() + 0.5) / len(weight)
        found += [low] if at < 0.4 else [high] if at > 0.6 else []
    return " ".join(found) or "in the middle"


def _card(page: Page, card: MixerCard, n: int, prompt: str, at: str) -> None:
    """The card of one LoRA: switch, strength and place; what it does (see `lines`), and below that, folded if unused, the
    rest of its tag and its file's facts. `at` says which drawing of the cards it is."""
    name, report = card["name"], page.actions.loras.report(card["name"])
    typed = fields_of(card, page.actions.studio.catalog.loras)
    triggers = report["triggers"][:MOST_CHIPS]
    present = triggers_in(prompt, triggers)
    own = [key for key in ("word", "lbw", "start", "stop") if typed[key]]
    is_set = own or in_switch(typed["region"]) is None or typed["te"] != typed["unet"] or report["problem"]

    def part(key: str) -> dict[str, Any]:
        return {"key": (name, key), **EDITABLE}

    def field(key: str, **options: Any) -> Any:
        return CARD[key](value=typed[key], min_width=90, **part(key), **options)

    def trigger_words() -> Any:
        return gr.CheckboxGroup(
            triggers, value=present, label=f"Trigger words of {name}", elem_classes="chips", **BARE, **part("chips")
        )

    with gr.Column(elem_classes=["card", f"c{card['colour']}", f"n{n}"]):
        with gr.Row(elem_classes="head", equal_height=True):
            figure(picture_of(page, name), label=f"what {name} looks like", key=(name, "picture"), **SMALL)
            parts: dict[str, Any] = {"on": gr.Checkbox(card["on"], label=name, container=False, min_width=80, **part("on"))}
            options: dict[str, Any] = {
                "buttons": [],
                "elem_classes": "slide",
                "min_width": 70,
                "key": (name, "slider"),
                **slider_update(typed["unet"]),
            }
            parts["slider"] = gr.Slider(LOW, HIGH, step=0.05, label=f"Strength of {name}", **BARE, **options)
            parts["unet"] = gr.Textbox(
                typed["unet"], label=f"Strength of {name}, any number", max_length=500, min_width=48, scale=0,
                elem_classes="any", **BARE, **part("unet"),
            )  # fmt: skip
            remove = gr.Button(
                f"Remove {name}", size="sm", min_width=28, scale=0, elem_classes="remove", key=(name, "remove")
            )
        switch = gr.Radio(
            list(SWITCH),
            value=in_switch(typed["region"]),
            label=f"Where {name} acts",
            elem_classes="place",
            **BARE,
            **part("place"),
        )
        chips = trigger_words() if len(present) < len(triggers) else None
        with gr.Accordion("Advanced", open=bool(is_set), elem_classes="rest"):
            if chips is None:
                chips = trigger_words()
            with gr.Row(elem_classes="binding"):
                of_file = f", {', '.join(triggers[:4])}" if triggers else ""
                parts["word"] = field("word", choices=triggers, info=f"none: those of its file{of_file}")
                parts["region"] = field("region")
            with gr.Row():
                parts |= {key: field(key) for key in ("te", "lbw", "start", "stop")}
            gr.Markdown(_facts(report, page.actions.studio.misfit(name)), elem_classes="facts")
    parts["place"] = switch
    _connect_fields(page, card, parts, at)
    _connect_prompt(page, name, remove, chips, HIDDEN({"ticked": present, "at": at}, key=(name, "ticked")))


def ticks_change(page: Page, cards: Sequence[MixerCard], before: str, now: str) -> bool:
    """Whether one prompt has other trigger words of these cards than another."""
    words = [page.actions.loras.report(card["name"])["triggers"] for card in cards] if before != now else []
    return any(triggers_in(before, each) != triggers_in(now, each) for each in words)


def in_switch(region: str) -> str | None:
    """The choice of the switch for a region; None for one that only the field under Advanced has."""
    return region if region in SWITCH else None


def picture_of(page: Page, name: str) -> Image.Image:
    """What a LoRA looks like, or its first letter."""
    if (found := page.actions.loras.thumbnail(name)) is not None:
        return found
    letter = Image.new("RGB", (SIDE, SIDE), "#4b5563")
    ImageDraw.Draw(letter).text((SIDE / 2,) * 2, name[:1].upper(), "white", ImageFont.load_default(SIDE // 2), anchor="mm")
    return letter


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


def _connect_fields(page: Page, card: MixerCard, parts: dict[str, Any], at: str) -> None:
    """Send a change of the switch, the slider or a field to the prompt, the cards and the other fields.

    Only changed values are read from the card, since the rest may be older than its tag. And only values that must change
    are written to it, since the visitor may be typing in the rest. If the cards have been drawn anew since the page showed
    this one, that was without this change: they are drawn once more.
    """
    known, name = page.actions.studio.catalog.loras, card["name"]

    def shows(card: MixerCard) -> dict[str, Any]:
        typed = fields_of(card, known)
        shown = {"on": card["on"], "slider": slider_update(typed["unet"])["value"], **typed}
        return shown | {"place": in_switch(typed["region"])}

    seen = HIDDEN({**shows(card), "at": at}, key=(name, "seen"))  # the values that this card shows

    @errors_to(page.prompt.problem)
    def write(
        seen_now: dict[str, Any],
        text: str,
        cards: list[MixerCard],
        rewrites: list[str],
        shown_now: dict[str, Any],
        *values: Any,
    ) -> Values:
        given = dict(zip(parts, values, strict=True))
        edits = {key: value for key, value in given.items() if (value or None) != (seen_now[key] or None)}
        place = next((i for i, one in enumerate(cards) if one["name"] == name), None)
        if place is None or not edits:  # the card was removed meanwhile, or nothing was changed
            return {}
        if edits.get("place") is not None:
            edits["region"] = edits["place"]
        edits.pop("place", None)
        is_moved = "slider" in edits
        if is_moved:
            edits["te"] = edits["unet"] = str(edits.pop("slider"))
        rewritten, cards = edit(newest(text, rewrites), cards, name, known, **{"on": cards[place]["on"], **edits})
        asked = {page.prompt.to_paint: (name, time.monotonic_ns())} if given["place"] == PAINTED != seen_now["place"] else {}
        values_of_page = page.prompt.rewrite(text, rewritten, rewrites) | asked
        if seen_now["at"] != str(shown_now["at"]):
            return values_of_page | page.prompt.redraw(cards)
        shown = shows(cards[place])
        written = {parts[key]: value for key, value in shown.items() if key != "slider" and value != given[key]}
        if not is_moved and shown["unet"] != seen_now["unet"]:
            written[parts["slider"]] = gr.update(**slider_update(shown["unet"]))
        return values_of_page | written | {page.prompt.cards: cards, seen: {**shown, "at": seen_now["at"]}}

    now = [seen, *page.prompt.written, page.prompt.shown]
    events = [parts["slider"].release, *(parts[key].input for key in ("on", "lbw", "word", "region", "place"))]
    for key in ("unet", "te", "start", "stop"):
        events += [parts[key].submit, parts[key].blur]
    outputs = [*now, *parts.values(), page.prompt.to_paint, page.prompt.problem]
    gr.on(events, write, [*now, *parts.values()], outputs, key=(name, "write"), **LAST)


def _connect_prompt(page: Page, name: str, remove: Any, chips: Any, ticked: Any) -> None:
    """Let removing the card and switching trigger words change the prompt. `ticked` has those that the card shows."""
    prompt, known = page.prompt, page.actions.studio.catalog.loras

    @errors_to(prompt.problem)
    def removed(text: str, cards: list[MixerCard], rewrites: list[str]) -> Values:
        left = [other for other in cards if other["name"] != name]
        return prompt.rewrite(text, with_tag(newest(text, rewrites), name, None, known), rewrites) | prompt.redraw(left)

    @errors_to(prompt.problem)
    def switched(
        before: dict[str, Any],
        chosen: list[str],
        text: str,
        cards: list[MixerCard],
        rewrites: list[str],
        shown_now: dict[str, Any],
    ) -> Values:
        new = with_triggers(newest(text, rewrites), before["ticked"], chosen, known)
        is_current = before["at"] == str(shown_now["at"])
        after = {ticked: {**before, "ticked": chosen}} if is_current else prompt.redraw(cards)
        return prompt.rewrite(text, new, rewrites) | after

    now = [*prompt.written, prompt.shown]
    chips.input(switched, [ticked, chips, *now], [ticked, *now, prompt.problem], key=(name, "switched"), **LAST)
    remove.click(removed, prompt.written, [*now, prompt.problem], key=(name, "removed"), **LAST)
