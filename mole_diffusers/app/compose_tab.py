"""The Compose tab: a prompt, a card per LoRA, pictures."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app import mixer, paint
from mole_diffusers.app.actions import Picture
from mole_diffusers.app.jobs import Job
from mole_diffusers.app.mixer_cards import MixerCard, cards_of
from mole_diffusers.app.page import ORDERED, Page, Values
from mole_diffusers.app.page_jobs import buttons, connect_job
from mole_diffusers.app.sentences import errors_to, markdown
from mole_diffusers.app.style import clicked, figure, gallery_items, row, status_line


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    prompt = page.controls["prompt"].render()
    page.problem.render()
    page.controls["negative"].render()
    with page.second.render():
        for name in ("prompt_2", "negative_2"):
            page.controls[name].render()
    compose, status = buttons(page, "compose", "Compose")
    with gr.Row(elem_classes="phone-column"):
        with gr.Column(scale=5):
            _often_changed(page)
            _adding(page)
            mixer.build(page)
            _settings(page)
        with gr.Column(scale=4, elem_classes="results"):
            preview = figure(label="Now", height=260, visible=False, buttons=[], elem_classes="pixel", elem_id="now")
            page.pictures.render()
            _use_picture(page, status)
            paint.build(page)

    def show(job: Job) -> Values:
        shown: Values = {page.pictures: gallery_items(job.event.pictures)}
        if job.is_over or job.event.preview is not None:
            shown[preview] = gr.update(value=job.event.preview, visible=not job.is_over)
        return shown

    @errors_to(page.problem)
    def changed(prompt: str, cards: list[MixerCard]) -> Values:
        catalog = page.actions.studio.catalog
        new = cards_of(prompt, cards, catalog.loras, catalog.preferred_weight)
        return ({} if new == cards else page.redraw(new)) | {page.rewrites: []}

    starts, outputs = [compose.click, prompt.submit], [status, preview, page.pictures]
    connect_job(page, "compose", starts, page.actions.compose, show, outputs, more=[page.count])
    shown = [page.cards, page.shown, page.rewrites, page.problem]
    gr.on([prompt.blur, prompt.submit], changed, [prompt, page.cards], shown, **mixer.LAST)


def _use_picture(page: Page, status: Any) -> None:
    """Buttons that use the picture that was clicked, or else the last one."""
    with gr.Row():
        over = gr.Button("Draw over this", size="sm", elem_id="draw-over-this")
        seed = gr.Button("Use its seed", size="sm", elem_id="use-seed")
    chosen = gr.State("")  # its file name

    def picture(request: gr.Request, chosen: str) -> Picture:
        if not (pictures := page.drawn(request)):
            raise ValueError("compose a picture first")
        return next((each for each in pictures if each.path.name == chosen), pictures[-1])

    @errors_to(status)
    def draw_over_it(request: gr.Request, chosen: str) -> Values:
        return page.put_over(picture(request, chosen).path)

    @errors_to(status)
    def use_seed(request: gr.Request, chosen: str) -> Values:
        return {page.controls["seed"]: picture(request, chosen).recipe.seed}

    page.pictures.select(clicked, None, chosen, trigger_mode="multiple")
    over.click(draw_over_it, chosen, [page.over, page.over_panel, status])
    seed.click(use_seed, chosen, [page.controls["seed"], status])


def _adding(page: Page) -> None:
    """Ways to add a LoRA: by name, found for the prompt, uploaded, or a file that was copied into one of the folders."""
    with gr.Row(equal_height=True):
        page.add.render()
        with gr.Column(min_width=120):
            find = gr.Button("Find LoRAs for the prompt", size="sm", elem_id="find")
            upload = gr.UploadButton("Upload a LoRA", file_types=[".safetensors"], size="sm", elem_id="upload")
            again = gr.Button("Look for new files", size="sm", elem_id="look-for-files")
    why = status_line(elem_id="why")
    check_fit = page.actions.studio.check_fit

    @errors_to(why)
    def chosen(name: str | None, *now: Any) -> Values:
        names = [name] if name else []
        check_fit(names)
        return page.edited(names, *now) | {page.add: None}

    @errors_to(why)
    def found(text: str) -> Any:
        hits = page.actions.find(text)
        names = [hit.name for hit in hits]
        check_fit(names)
        words = "; ".join(f"**{markdown(hit.name)}**: {markdown(hit.why)}" for hit in hits)
        return names, words or "The prompt asks for none of the LoRAs here."

    @errors_to(why)
    def uploaded(path: str) -> Any:
        name = page.actions.add_lora(Path(path))
        check_fit([name])
        return [name], f"added **{markdown(name)}**"

    def looked_again() -> str:
        return f"new: {markdown(', '.join(names))}" if (names := page.actions.find_loras()) else "no new LoRA files"

    outputs = [*page.written, page.shown, page.add, why]
    page.add.input(chosen, [page.add, *page.written], outputs, trigger_mode="multiple", **ORDERED)
    _add_found(page, find.click, found, page.controls["prompt"], why, concurrency_limit=None)
    for event in (_add_found(page, upload.upload, uploaded, upload, why), again.click(looked_again, None, why)):
        event.then(page.now, None, page.lists, show_progress="hidden")


def _add_found(page: Page, event: Any, find: Any, given: Any, why: Any, **options: Any) -> Any:
    """Let an event find the names of LoRAs, which may take long, and add them to the prompt as it is when they are found."""
    names = gr.State([])

    def add(found: list[str], *now: Any) -> Values:
        return (page.edited(found, *now) if found else {}) | {names: []}

    known = event(find, given, [names, why], **options)
    return known.then(add, [names, *page.written], [names, *page.written, page.shown], **ORDERED)


def _often_changed(page: Page) -> None:
    """The settings that often change from one picture to the next."""
    fields = page.controls
    with gr.Row():
        with gr.Column(min_width=140):
            fields["seed"].render()
            new = gr.Button("New seed", size="sm", elem_id="new-seed")
            new.click(lambda: random.randrange(2**32), None, fields["seed"], queue=False)
        with gr.Column(scale=2, min_width=320):
            row(page.count, fields["steps"])
            fields["guidance"].render()


def _settings(page: Page) -> None:
    """The other fields of a recipe."""
    fields = page.controls
    with gr.Accordion("More settings", open=True):
        row(fields["width"], fields["height"])
        row(fields["sampler"], fields["clip_skip"])
        row(fields["gates"], fields["binding"])
    with page.over_panel.render():
        gr.Markdown("Paint what is to change in a picture, or nothing for all of it.")
        page.over.render()
        page.over_status.render()
        fields["strength"].render()
        row(fields["hires"], fields["hires_strength"])
        fields["detail"].render()
