"""The Compose tab: a prompt, a card per LoRA, pictures."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app import mixer, paint
from mole_diffusers.app.actions import Picture
from mole_diffusers.app.jobs import Job
from mole_diffusers.app.mixer_cards import MixerCard, cards_of, edit, newest
from mole_diffusers.app.page import ORDERED, PRIVATE, Page, Values
from mole_diffusers.app.page_jobs import Offer, connect_cancel, connect_job
from mole_diffusers.app.sentences import markdown, told
from mole_diffusers.app.style import clicked, figure, gallery_items
from mole_diffusers.studio.prompt_syntax import parse
from mole_diffusers.studio.recipe import Recipe


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    prompt = page.controls["prompt"].render()
    page.line.render()
    page.controls["negative"].render()
    with page.second.render():
        for name in ("prompt_2", "negative_2"):
            page.controls[name].render()
    with gr.Row(elem_classes="buttons"):
        compose = gr.Button("Compose", variant="primary", elem_id="compose")
        cancel = gr.Button("Cancel", elem_id="cancel")
    status = gr.Markdown("", elem_id="status", elem_classes="status")
    offer = Offer(page, "compose", "Draw again", _described)
    with gr.Row(elem_classes="phone-column"):
        with gr.Column(scale=5):
            _adding(page)
            mixer.build(page)
            _settings(page)
        with gr.Column(scale=4, elem_classes="results"):
            preview = figure(label="Now", height=260, buttons=[], elem_classes="pixel", elem_id="now")
            page.pictures.render()
            _use_picture(page, status)
            paint.build(page)

    def show(job: Job) -> Values:
        pictures = job.event.pictures
        now = str(pictures[-1].path) if job.is_over and pictures else job.event.preview
        return {page.pictures: gallery_items(pictures)} | ({} if now is None else {preview: now})

    @told(page.line)
    def changed(prompt: str, cards: list[MixerCard]) -> Values:
        new = cards_of(prompt, cards, page.actions.studio.catalog.loras)
        return ({} if new == cards else page.redraw(new)) | {page.rewrites: [], page.line: ""}

    starts, outputs = [compose.click, prompt.submit], [preview, page.pictures]
    plan, more = page.actions.compose, [page.count]
    connect_job(page, "compose", starts, plan, show, more=more, status=status, outputs=outputs, offer=offer)
    connect_cancel(page, cancel, status, ["compose"])
    shown = [page.cards, page.shown, page.rewrites, page.line]
    gr.on([prompt.blur, prompt.submit], changed, [prompt, page.cards], shown, **mixer.LAST)


def _described(recipe: Recipe, count: int) -> str:
    """What pictures that were not drawn when the app ended are called."""
    return f"“{markdown(recipe.prompt[:80])}”{f', {count} pictures,' if count > 1 else ''}"


def _use_picture(page: Page, status: Any) -> None:
    """What becomes of the picture that was clicked, or else of the last one."""
    with gr.Row():
        over = gr.Button("Draw over this", size="sm", elem_id="draw-over-this")
        seed = gr.Button("Use its seed", size="sm", elem_id="use-seed")
    chosen = gr.State("")  # its file name

    def picture(request: gr.Request, chosen: str) -> Picture:
        if not (pictures := page.drawn(request)):
            raise ValueError("compose a picture first")
        return next((each for each in pictures if each.path.name == chosen), pictures[-1])

    @told(status)
    def draw_over_it(request: gr.Request, chosen: str) -> Values:
        return page.put_over(picture(request, chosen).path) | {status: ""}

    @told(status)
    def use_seed(request: gr.Request, chosen: str) -> Values:
        return {page.controls["seed"]: picture(request, chosen).recipe.seed, status: ""}

    page.pictures.select(clicked, None, chosen, trigger_mode="multiple", **PRIVATE)
    over.click(draw_over_it, chosen, [page.over, page.over_panel, status], **PRIVATE)
    seed.click(use_seed, chosen, [page.controls["seed"], status], **PRIVATE)


def _adding(page: Page) -> None:
    """Three ways to add a LoRA: by name, found for the prompt, or uploaded; and files that were copied into the folders."""
    catalog, prompt = page.actions.studio.catalog, page.controls["prompt"]
    with gr.Row(equal_height=True):
        page.add.render()
        with gr.Column(min_width=120):
            find = gr.Button("Find LoRAs for the prompt", size="sm", elem_id="find")
            upload = gr.UploadButton(
                "Upload a LoRA", file_types=[".safetensors"], type="filepath", size="sm", elem_id="upload"
            )
            again = gr.Button("Look for new files", size="sm", elem_id="look-for-files")
    why = gr.Markdown("", elem_id="why", elem_classes="status")

    @told(why)
    def chosen(name: str | None, *now: Any) -> Values:
        return _added(page, _fitting(page, [name] if name else []), *now) | {page.add: None, why: ""}

    @told(why)
    def found(text: str) -> Any:
        hits = page.actions.find(parse(text, catalog.loras).text)
        words = "; ".join(f"**{markdown(hit.name)}**: {markdown(hit.why)}" for hit in hits)
        return _fitting(page, [hit.name for hit in hits]), words or "The prompt asks for none of the LoRAs here."

    @told(why)
    def uploaded(path: str) -> Any:
        name = page.actions.add_lora(Path(path))
        return _fitting(page, [name]), f"added **{markdown(name)}**"

    def looked_again() -> str:
        return f"new: {markdown(', '.join(names))}" if (names := page.actions.find_loras()) else "no new LoRA files"

    now = [prompt, page.cards, page.rewrites]
    outputs = [*now, page.shown, page.add, why]
    page.add.input(chosen, [page.add, *now], outputs, trigger_mode="multiple", **ORDERED, **PRIVATE)
    _add_found(page, find.click, found, prompt, why, concurrency_limit=None)
    for event in (
        _add_found(page, upload.upload, uploaded, upload, why),
        again.click(looked_again, None, why, **PRIVATE),
    ):
        event.then(page.now, None, page.lists, show_progress="hidden", **PRIVATE)


def _add_found(page: Page, event: Any, find: Any, given: Any, why: Any, **options: Any) -> Any:
    """Let an event find the names of LoRAs, which may take long, and then add them to the prompt as it is by then."""
    names, now = gr.State([]), [page.controls["prompt"], page.cards, page.rewrites]

    def add(found: list[str], *now: Any) -> Values:
        return (_added(page, found, *now) if found else {}) | {names: []}

    known = event(find, given, [names, why], **options, **PRIVATE)
    return known.then(add, [names, *now], [names, *now, page.shown], **ORDERED, **PRIVATE)


def _fitting(page: Page, names: list[str]) -> list[str]:
    """The names. Raises ValueError for a LoRA that cannot be used with this base."""
    for name in names:
        if why_not := page.actions.studio.misfit(name):
            raise ValueError(f"the LoRA {name!r} cannot be used here: {why_not}")
    return names


def _added(page: Page, names: Iterable[str], text: str, cards: list[MixerCard], rewrites: list[str]) -> Values:
    """Prompt and cards with these LoRAs switched on."""
    new = newest(text, rewrites)
    for name in names:
        new, cards = edit(new, cards, name, page.actions.studio.catalog.loras)
    return page.rewrite(text, new, rewrites) | page.redraw(cards)


def _settings(page: Page) -> None:
    """The other fields of a recipe, and the number of pictures."""
    fields = page.controls
    with gr.Accordion("Settings", open=True):
        with gr.Row():
            with gr.Column(min_width=120):
                fields["seed"].render()
                new = gr.Button("New seed", size="sm", elem_id="new-seed")
                new.click(lambda: random.randrange(2**32), None, fields["seed"], queue=False, **PRIVATE)
            fields["steps"].render()
        for row in (
            (fields["guidance"], page.count),
            (fields["width"], fields["height"]),
            (fields["sampler"], fields["gates"], fields["binding"]),
        ):
            with gr.Row():
                for field in row:
                    field.render()
    with page.over_panel.render():
        gr.Markdown("Paint what is to change in a picture, or nothing for all of it.")
        page.over.render()
        fields["strength"].render()
        with gr.Row():
            fields["hires"].render()
            fields["hires_strength"].render()
