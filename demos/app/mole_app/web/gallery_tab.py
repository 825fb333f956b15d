"""The Gallery tab: search kept pictures and sheets, use them again, and mark favourites."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mole_app.web.page import Page
from mole_app.web.sentences import errors_to, markdown
from mole_app.web.stage import chosen_picture, connect_use
from mole_app.web.style import Values, clicked, gallery, gallery_items, status_line

AT_ONCE = 60  # pictures shown at first; "Show more" adds as many


def build(page: Page) -> None:
    """Lay out the tab and connect it. The gallery is searched again whenever the tab is shown."""
    kept = page.actions.gallery
    with gr.Row(elem_classes="phone-column"):
        text = gr.Textbox(label="Search", info="words of the prompt, comparison, grid", max_length=500, elem_id="find-text")
        lora = gr.Textbox(label="With the LoRA", max_length=200, elem_id="find-lora")
        starred = gr.Checkbox(label="Favourites only", elem_id="find-starred")
    status = status_line(elem_id="gallery-status")
    pictures = gallery(label="Gallery", columns=4, elem_id="gallery")
    more = gr.Button("Show more", size="sm", visible=False, elem_id="gallery-more")
    with gr.Row():
        use = gr.Button("Use its settings", variant="primary", elem_id="use")
        over = gr.Button("Draw over this", elem_id="gallery-over")
        star = gr.Button("Favourite", elem_id="star")
    chosen = gr.State("")  # the file name of the picture that was clicked
    count = gr.State(AT_ONCE)  # how many are shown
    asked = [text, lora, starred]

    def search(name: str, text: str, lora: str, starred: bool, most: int = AT_ONCE, *, words: str = "") -> Values:
        """Values of `outputs`. The chosen picture stays so while it is shown. The status begins with `words`."""
        found = kept.entries(text=text or "", lora=(lora or "").strip(), favourites=starred)
        shown, is_cut = found[:most], len(found) > most
        name = name if name in [entry.path.name for entry in shown] else ""
        words = words or (f"chosen: {markdown(name)}; " if name else "")
        said = f"{words}{len(found)} picture{'' if len(found) == 1 else 's'}"
        return {
            pictures: gr.update(value=gallery_items(shown), selected_index=None),
            count: most,
            more: gr.update(visible=is_cut),
            chosen: name,
            status: said + (f", the newest {most} of them shown" if is_cut else ""),
        }

    def show_more(name: str, text: str, lora: str, starred: bool, most: int) -> Values:
        return search(name, text, lora, starred, most + AT_ONCE)

    def choose(event: gr.SelectData) -> Any:
        return clicked(event), f"chosen: {markdown(clicked(event))}"

    @errors_to(status)
    def favour(name: str, *asked: Any) -> Values:
        on = not kept.entry(chosen_picture(name)).favourite
        kept.favour(name, on)
        return search(name, *asked, words="marked; " if on else "no longer marked; ")

    outputs = [pictures, count, more, chosen, status]
    # A search while typing may end after a click on what was found before, so one waits for the other.
    one_by_one: dict[str, Any] = {"concurrency_id": "gallery", "concurrency_limit": 1}
    asking = [page.tab["Gallery"].select, starred.input, text.input, lora.input]
    gr.on(asking, search, [chosen, *asked], outputs, trigger_mode="always_last", show_progress="hidden", **one_by_one)
    more.click(show_more, [chosen, *asked, count], outputs, **one_by_one)
    pictures.select(choose, None, [chosen, status], trigger_mode="multiple", **one_by_one)
    connect_use(page, chosen, use, over, status)
    star.click(favour, [chosen, *asked, count], outputs, **one_by_one)
