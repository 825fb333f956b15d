"""The browser of LoRAs: pictures of all that are here, by folder, words and order. A click puts one into the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from mole_app.web.mixer import picture_of
from mole_app.web.mixer_cards import MixerCard
from mole_app.web.page import Page
from mole_app.web.prompt_box import ORDERED
from mole_app.web.sentences import errors_to, markdown
from mole_app.web.style import Values, status_line

ALL = "all folders"
ORDERS = {"for this base first": "fit", "by name": "name", "newest first": "newest"}
AT_ONCE = 48  # LoRAs shown at first; "Show more" adds as many


def build(page: Page) -> Any:
    """Lay out the button that opens the browser and the other ways to add a LoRA, and connect the browser to it. Returns
    the browser."""
    with gr.Row(elem_classes="adding", equal_height=True):
        browse = gr.Button("Browse LoRAs", size="sm", min_width=90, elem_id="browse")
        find = gr.Button("Find for the prompt", size="sm", min_width=110, elem_id="find")
        upload = gr.UploadButton("Upload", file_types=[".safetensors"], size="sm", min_width=60, elem_id="upload")
    why = status_line(elem_id="why")
    browser = _panel(page, browse)
    check_fit = page.actions.studio.check_fit

    @errors_to(why)
    def chosen(name: str | None, *now: Any) -> Values:
        names = [name] if name else []
        check_fit(names)
        return page.prompt.edited(names, *now) | {by_name: None}

    @errors_to(why)
    def found(text: str) -> Any:
        hits = page.actions.loras.find(text)
        names = [hit.name for hit in hits]
        check_fit(names)
        words = "; ".join(f"**{markdown(hit.name)}**: {markdown(hit.why)}" for hit in hits)
        return names, words or "The prompt asks for none of the LoRAs here."

    @errors_to(why)
    def uploaded(path: str) -> Any:
        name = page.actions.loras.add(Path(path))
        check_fit([name])
        return [name], f"added **{markdown(name)}**"

    by_name = page.form.more["add"]
    outputs = [*page.prompt.written, page.prompt.shown, by_name, why]
    by_name.input(chosen, [by_name, *page.prompt.written], outputs, trigger_mode="multiple", **ORDERED)
    _add_found(page, find.click, found, page.prompt.text, why, concurrency_limit=None)
    event = _add_found(page, upload.upload, uploaded, upload, why)
    event.then(page.form.now, None, page.form.lists, show_progress="hidden")
    return browser


def _add_found(page: Page, event: Any, find: Any, given: Any, why: Any, **options: Any) -> Any:
    """Let an event find the names of LoRAs, which may take long, and add them to the prompt as it is when they are found."""
    names = gr.State([])

    def add(found: list[str], *now: Any) -> Values:
        return (page.prompt.edited(found, *now) if found else {}) | {names: []}

    known = event(find, given, [names, why], **options)
    return known.then(add, [names, *page.prompt.written], [names, *page.prompt.written, page.prompt.shown], **ORDERED)


def _panel(page: Page, browse: Any) -> Any:
    """The browser itself, which covers the large picture while it is open. `browse` opens and closes it."""
    with gr.Column(visible=False, elem_id="browser") as panel:
        with gr.Row(equal_height=True):
            text = gr.Textbox(label="Search LoRAs", max_length=200, min_width=140, elem_id="lora-search")
            where = gr.Dropdown([ALL], value=ALL, label="Folder", min_width=120, elem_id="lora-folder")
            order = gr.Dropdown(list(ORDERS), value=next(iter(ORDERS)), label="Order", min_width=120, elem_id="lora-order")
        grid = gr.Gallery(
            columns=6, height="auto", object_fit="cover", buttons=[], interactive=False, allow_preview=False,
            show_label=False, label="LoRAs", elem_id="loras",
        )  # fmt: skip
        with gr.Row(elem_id="lora-buttons"):
            more = gr.Button("Show more", size="sm", visible=False, elem_id="lora-more")
            again = gr.Button("Look for new files", size="sm", elem_id="look-for-files")
            done = gr.Button("Done", size="sm", variant="primary", elem_id="lora-done")
        said = status_line(elem_id="lora-status")
    names, count = gr.State([]), gr.State(AT_ONCE)  # those that are shown; how many at most

    def search(
        text: str, folder: str, order: str, cards: list[MixerCard], most: int = AT_ONCE, *, words: str = ""
    ) -> Values:
        loras, used = page.actions.studio.catalog.loras, {card["name"] for card in cards if card["on"]}
        found = matching_loras(loras, text or "", folder or ALL)
        fits = {name: not page.actions.studio.misfit(name) for name in found}
        found = sorted_loras(found, loras, ORDERS.get(order, "name"), fits)
        shown = found[:most]
        items = [
            (str(page.actions.small_lora(name, partial(picture_of, page))), caption(page, name, fits[name], name in used))
            for name in shown
        ]
        number = f"{len(found)} LoRA{'' if len(found) == 1 else 's'}; click one to add it, or to take it off again"
        return {
            grid: gr.update(value=items, selected_index=None),
            names: shown,
            count: most,
            more: gr.update(visible=len(found) > most),
            where: gr.update(choices=[ALL, *folders_of(loras)]),
            said: "; ".join(filter(None, [words, number])) if loras else NONE_HERE,
        }

    asked = [text, where, order, page.prompt.cards]

    @errors_to(said)
    def picked(event: gr.SelectData, names: list[str], *now: Any) -> Values:
        name, (_, cards, _) = names[event.index], now
        page.actions.studio.check_fit([name])
        if any(card["name"] == name and card["on"] for card in cards):
            return page.prompt.edited([name], *now, on=False) | {said: f"**{markdown(name)}** is off"}
        return page.prompt.edited([name], *now) | {said: f"added **{markdown(name)}**"}

    def look_again(*asked: Any) -> Values:
        new = page.actions.loras.look_for_new()
        return search(*asked, words=f"new: {markdown(', '.join(new))}" if new else "no new files")

    def show_more(text: str, where: str, order: str, cards: list[MixerCard], most: int) -> Values:
        return search(text, where, order, cards, most + AT_ONCE)

    def marked(*given: Any) -> Values:  # which are in the prompt
        return {grid: search(*given)[grid]}

    outputs = [grid, names, count, more, where, said]
    asking = [browse.click, text.input, where.change, order.change]  # leaving a list sends `input`, too
    gr.on(asking, search, asked, outputs, trigger_mode="always_last", show_progress="hidden")
    page.prompt.shown.change(marked, [*asked, count], grid, trigger_mode="always_last", show_progress="hidden")
    more.click(show_more, [*asked, count], outputs)
    again.click(look_again, asked, outputs).then(page.form.now, None, page.form.lists, show_progress="hidden")
    written = page.prompt.written
    grid.select(picked, [names, *written], [*written, page.prompt.shown, said], trigger_mode="multiple", **ORDERED)
    browse.click(lambda: gr.update(visible=True), None, panel)
    done.click(lambda: gr.update(visible=False), None, panel).then(None, js=SHOW_CARDS)
    return panel


# On a phone the cards are below the picture.
SHOW_CARDS = """() => setTimeout(() => {
  if (innerWidth <= 900) document.querySelector(".card")?.scrollIntoView({ block: "center" });
}, 100)"""
NONE_HERE = "No LoRAs here yet: start the app with --loras FOLDER, or upload one."


def matching_loras(loras: Mapping[str, Path], text: str, folder: str) -> list[str]:
    """The LoRAs of a folder whose names have all these words."""
    words = text.lower().split()
    return [
        name for name, path in loras.items()
        if folder in (ALL, path.parent.name) and all(word in name.lower() for word in words)
    ]  # fmt: skip


def folders_of(loras: Mapping[str, Path]) -> list[str]:
    """The names of the folders that LoRAs are in, if they are several."""
    found = sorted({path.parent.name for path in loras.values() if not path.parent.name.startswith(".")})
    return found if len(found) > 1 else []


def sorted_loras(names: list[str], loras: Mapping[str, Path], order: str, fits: Mapping[str, bool]) -> list[str]:
    """LoRAs in an order of `ORDERS`."""
    if order == "newest":
        return sorted(names, key=lambda name: -loras[name].stat().st_mtime if loras[name].exists() else 0)
    return sorted(names, key=lambda name: (order == "fit" and not fits[name], name.lower()))


def caption(page: Page, name: str, fits: bool, is_on: bool) -> str:
    """What stands below a LoRA's picture: its name, the strength it likes, and whether it is in the prompt."""
    weight = page.actions.studio.catalog.preferred_weight(name)
    marks = [] if is_on or fits else ["for another model"]
    return " · ".join([f"✓ {name}" if is_on else name, *([f"{weight:g}"] if weight is not None else []), *marks])
