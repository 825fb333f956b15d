"""The Compose tab: the large picture, at its left the prompt, the LoRAs and the settings, at its right the newest ones."""

from __future__ import annotations

import random
from typing import Any

import gradio as gr

from mole_app.web import lora_browser, mixer, presets_panel, sizes
from mole_app.web.mixer_cards import MixerCard
from mole_app.web.page import Page
from mole_app.web.paint import Painting
from mole_app.web.prompt_box import ORDERED
from mole_app.web.queue_panel import QueuePanel
from mole_app.web.recipe_tab import fill_from
from mole_app.web.side_by_side import SideBySide
from mole_app.web.stage import Stage
from mole_app.web.style import Values, row, status_line

HISTORY = 30  # earlier prompts that are listed


def build(page: Page) -> None:
    """Lay out the tab and connect it. `page.css` says where each part is, on a desk and on a phone."""
    stage, queue, side_by_side = Stage(page), QueuePanel(page), SideBySide(page)
    with gr.Column(elem_id="studio"):
        with gr.Column(elem_id="ask"):
            undo, browser = _ask(page, queue)
        with gr.Column(elem_id="stage"):
            stage.frame.render()
            with gr.Column(elem_id="view"):
                stage.picture.render()
                painting = Painting(page, stage)
            painting.build_tools()
            paint = stage.build_tools()
            side_by_side.build()  # below all else, so that nothing moves when it comes and goes
        with gr.Column(elem_id="side"):
            stage.map.render()
            queue.build_list()
            stage.strip.render()
        with gr.Column(elem_id="controls"):
            mixer.build(page, side_by_side)
            _settings(page)
    queue.connect(stage, [page.prompt.text.submit], [*page.form.inputs, page.form.more["count"], *page.pictures])
    queue.shows_the_picture(browser)
    stage.connect()
    painting.connect(paint)
    _connect_prompt(page, undo)


def _ask(page: Page, queue: QueuePanel) -> tuple[Any, Any]:
    """The prompt, the buttons that draw it, and the LoRAs to add. Returns the button that undoes its last change, and the
    browser of LoRAs."""
    page.prompt.text.render()
    page.prompt.problem.render()
    page.form.controls["negative"].render()
    with gr.Row(elem_id="go", equal_height=True):
        queue.button.render()
        queue.more.render()
        undo = gr.Button("Undo", scale=1, min_width=70, elem_id="undo")
    queue.bar.render()
    queue.status.render()
    return undo, lora_browser.build(page)


def _connect_prompt(page: Page, undo: Any) -> None:
    """Keep the cards in step with what is typed, and bring back what the prompt was."""
    prompt = page.prompt.text

    def changed(text: str, cards: list[MixerCard], rewrites: list[str]) -> Values:
        found = page.prompt.cards_now(text, cards)
        if page.prompt.shown not in found and mixer.ticks_change(page, cards, "".join(rewrites[-1:]), text):
            found |= page.prompt.redraw(cards)
        return found | {page.prompt.rewrites: page.prompt.typed(text, rewrites)}

    gr.on([prompt.blur, prompt.submit], changed, page.prompt.written, page.prompt.of_cards, **mixer.LAST)
    undo.click(page.prompt.undo, [prompt, page.prompt.rewrites], [prompt, *page.prompt.of_cards], **ORDERED)


def _settings(page: Page) -> None:
    """The other fields of a recipe."""
    fields = page.form.controls
    sizes.build(page)
    with gr.Row():
        fields["seed"].render()
        new = gr.Button("New seed", size="sm", min_width=80, scale=0, elem_id="new-seed")
        new.click(lambda: random.randrange(2**32), None, fields["seed"], queue=False)
    row(page.form.more["count"], fields["steps"])
    fields["guidance"].render()
    presets_panel.build(page)
    _earlier(page)
    with page.over.panel.render():
        gr.Markdown("Paint what is to change in a picture, or nothing for all of it.")
        page.over.build_picture()
        page.over.status.render()
        fields["strength"].render()
        row(fields["hires"], fields["hires_strength"])
        row(fields["upscaler"], fields["detail"])
    with page.form.more["given"].render():
        gr.Markdown("A control map is drawn already: edges, depths, a pose, ... as its ControlNet reads them.")
        row(fields["controlnet"], page.form.pictures["control"])
        row(fields["control_strength"], fields["control_end"])
        row(fields["ip_adapter"], page.form.pictures["reference"])
        fields["ip_scale"].render()
    with page.form.more["second"].render():
        for name in ("prompt_2", "negative_2"):
            fields[name].render()
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        row(fields["width"], fields["height"])
        row(fields["sampler"], fields["clip_skip"])
        row(fields["binding"], fields["gates"])
        page.form.more["add"].render()


def _earlier(page: Page) -> None:
    """The prompts of the newest pictures, to take one again, and the settings of a picture file."""
    file = gr.UploadButton("Settings from a picture", file_types=[".png", ".json"], size="sm", elem_id="from-picture")
    status = status_line(elem_id="from-picture-status")
    fill_from(page, file, status)
    with gr.Accordion("Earlier prompts", open=False, elem_id="history") as panel:
        earlier = gr.Radio([], label="Earlier prompts", show_label=False, container=False, elem_id="earlier")

    def listed() -> Any:
        prompts = dict.fromkeys(entry.recipe.prompt for entry in page.actions.gallery.entries())
        return gr.update(choices=[prompt for prompt in prompts if prompt][:HISTORY], value=None)

    def taken(prompt: str, *now: Any) -> Values:
        text, cards, rewrites = now
        return page.prompt.replaced(text, prompt, cards, rewrites)

    panel.expand(listed, None, earlier)
    earlier.input(taken, [earlier, *page.prompt.written], [page.prompt.text, *page.prompt.of_cards], **ORDERED)
