"""The Gallery tab: what was composed and compared, found again, used again, marked and thrown away."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mole_diffusers.app import draw_over
from mole_diffusers.app.page import PRIVATE, Page, gallery, markdown, told
from mole_diffusers.studio import infotext

AT_ONCE = 60  # pictures shown at first, and so many more each time


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    kept = page.actions.gallery
    with gr.Row():
        text = gr.Textbox(
            label="Search",
            info="words of the prompt, comparison, grid",
            max_length=500,
            elem_id="find-text",
        )
        lora = gr.Textbox(label="With the LoRA", max_length=200, elem_id="find-lora")
        starred = gr.Checkbox(label="Favourites only", elem_id="find-starred")
    status = gr.Markdown("", elem_id="gallery-status", elem_classes="status")
    pictures = gallery("Gallery", columns=4, elem_id="gallery")
    more = gr.Button("Show more", size="sm", visible=False, elem_id="gallery-more")
    with gr.Row():
        use = gr.Button("Use again", variant="primary", elem_id="use")
        over = gr.Button("Draw over this", elem_id="gallery-over")
        star = gr.Button("Favourite", elem_id="star")
        trash = gr.Button("To the trash", elem_id="trash")
    names, chosen = gr.State([]), gr.State("")  # file names in the order shown; the one that was clicked
    most = gr.State(AT_ONCE)  # so many are shown
    asked = [text, lora, starred]

    def search(text: str, lora: str, starred: bool, most: int = AT_ONCE, *, words: str = "") -> Any:
        """Values of `outputs`; `words` begin the status."""
        found = kept.entries(text=text or "", lora=(lora or "").strip(), favourites=starred)
        shown, is_cut = found[:most], len(found) > most
        items = [(str(entry.path), entry.label) for entry in shown]
        said = f"{words}{len(found)} picture{'' if len(found) == 1 else 's'}"
        said += f", the newest {most} of them shown" if is_cut else ""
        listed = gr.update(value=items, selected_index=None), [entry.path.name for entry in shown]
        return *listed, most, gr.update(visible=is_cut), "", said

    def show_more(text: str, lora: str, starred: bool, most: int) -> Any:
        return search(text, lora, starred, most + AT_ONCE)

    def choose(names: list[str], event: gr.SelectData) -> Any:
        return names[event.index], f"chosen: {markdown(names[event.index])}"

    @told(len(page.filled_fields) + 2)
    def reuse(name: str) -> Any:
        wanted = _the_chosen(name)
        entry = next((entry for entry in kept.entries() if entry.path.name == wanted), None)
        if entry is None:
            raise ValueError(f"there is no picture {wanted!r} in the gallery")
        axes = infotext.axes_of(entry.shows)
        _, values, notes = page.filled(entry.recipe, axes)
        tab = "Keep" if axes else "Compose"  # where the button for it is
        words = ["its recipe is in all fields", entry.sheet and f"it shows {entry.sheet}", *notes]
        return [*values, gr.update(selected=tab), markdown("; ".join(filter(None, words)))]

    @told(4)
    def draw_over_it(name: str) -> Any:
        return *draw_over.put(kept.path(_the_chosen(name))), gr.update(selected="Compose"), 'it is in "Draw over a picture"'

    outputs = [pictures, names, most, more, chosen, status]

    @told(len(outputs))
    def favour(name: str, *asked: Any) -> Any:
        on = _the_chosen(name) not in [entry.path.name for entry in kept.entries(favourites=True)]
        kept.favour(name, on)
        *listed, _, status = search(*asked, words="marked; " if on else "no longer marked; ")
        return *listed, name if name in listed[1] else "", status

    @told(len(outputs))
    def throw(name: str, *asked: Any) -> Any:
        kept.trash(_the_chosen(name))
        return search(*asked, words="moved to the folder trash beside the pictures; ")

    searched = [page.tab.select, text.submit, text.blur, lora.submit, lora.blur, starred.input]
    gr.on(searched, search, asked, outputs, **PRIVATE)
    more.click(show_more, [*asked, most], outputs, **PRIVATE)
    pictures.select(choose, names, [chosen, status], **PRIVATE)
    use.click(reuse, chosen, [*page.filled_fields, page.tabs, status], **PRIVATE)
    over.click(draw_over_it, chosen, [page.over, page.over_panel, page.tabs, status], **PRIVATE)
    star.click(favour, [chosen, *asked, most], outputs, **PRIVATE)
    trash.click(throw, [chosen, *asked, most], outputs, **PRIVATE)


def _the_chosen(name: str) -> str:
    if not name:
        raise ValueError("click a picture first")
    return name
