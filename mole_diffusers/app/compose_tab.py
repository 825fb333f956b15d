"""The Compose tab: a prompt, a card per LoRA, pictures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app import draw_over, mixer, paint
from mole_diffusers.app.actions import Picture
from mole_diffusers.app.interrupted import Offer, offer, read
from mole_diffusers.app.jobs import Job, Work
from mole_diffusers.app.mixer_cards import MixerCard, add_card, cards_of
from mole_diffusers.app.page import (
    PRIVATE,
    Page,
    connect_cancel,
    connect_job,
    gallery,
    gallery_items,
    markdown,
    redraw,
    told,
)
from mole_diffusers.binding.config import mask_text, read_mask
from mole_diffusers.binding.regions import AUTO
from mole_diffusers.studio.prompt_syntax import parse
from mole_diffusers.studio.prompt_weights import prompts_read
from mole_diffusers.studio.recipe import BOUND, RANGES, TILES, Recipe
from mole_diffusers.studio.render import with_pictures


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    prompt = _prompts(page)
    with gr.Row(elem_classes="buttons"):
        compose = gr.Button("Compose", variant="primary", elem_id="compose")
        cancel = gr.Button("Cancel", elem_id="cancel")
    status = gr.Markdown("", elem_id="status", elem_classes="status")
    offer = _offer(page)
    with gr.Row(elem_classes="phone-column"):
        with gr.Column(scale=5):
            _adding(page, prompt)
            mixer.build(page)
            count = _settings(page)
            draw_over.build(page)
        with gr.Column(scale=4, elem_classes="results"):
            preview = gr.Image(
                label="Now", format="png", interactive=False, height=260, buttons=[], elem_classes="pixel", elem_id="now"
            )
            page.pictures = gallery("Pictures", columns=2, elem_id="pictures")
            _use_picture(page, status)
            paint.build(page)
    page.fields.append(count)

    def plan(*values: Any) -> Work:
        *given, number, editor = values
        return page.actions.compose(page.recipe(*given), int(number), draw_over.pictures(editor))

    def show(job: Job) -> list[Any]:
        pictures = job.event.pictures
        now = str(pictures[-1].path) if job.is_over and pictures else job.event.preview
        return [now, gallery_items(pictures)]

    starts, inputs, outputs = [compose.click, prompt.submit], [*page.inputs, count, page.over], [preview, page.pictures]
    offer = replace(offer, inputs=[page.over])
    connect_job(page, "compose", starts, plan, show, inputs=inputs, status=status, outputs=outputs, offer=offer)
    connect_cancel(page, cancel, status, ["compose"])
    changed = [page.cards, page.shown, page.line]
    for event in (prompt.blur, prompt.submit):
        event(_prompt_changed(page), [prompt, page.cards], changed, show_progress="hidden", **PRIVATE)


def _offer(page: Page) -> Offer:
    """Of pictures that were not drawn when the app ended."""

    def keep(*values: Any) -> dict[str, Any]:
        *given, number, editor = values
        over = draw_over.pictures(editor)
        recipe = replace(with_pictures(page.recipe(*given), **over), base=page.actions.studio.base)
        mask = over.get("mask")
        return {"recipe": recipe.to_dict(), "count": int(number), "mask": "" if mask is None else mask_text(mask)}

    def describe(kept: dict[str, Any]) -> str:
        recipe, count = Recipe.from_dict(kept["recipe"]), int(kept["count"])
        return f"“{markdown(recipe.prompt[:80])}”{f', {count} pictures,' if count > 1 else ''}"

    def plan(path: Path, editor: Any) -> Work:
        recipe, count, mask = read(path, lambda kept: (Recipe.from_dict(kept["recipe"]), int(kept["count"]), kept["mask"]))
        page.actions.check_base(recipe.base, "change it first")
        over = draw_over.pictures(editor if recipe.image else None)
        over.pop("mask", None)  # what is painted now
        if over and mask:
            over["mask"] = read_mask(mask)
        return page.actions.compose(recipe, count, over)

    return offer(page.visitor, page.interrupted, "compose", "Draw again", describe, keep=keep, plan=plan)


def _prompts(page: Page) -> Any:
    page.controls["prompt"] = gr.Textbox(
        page.defaults.prompt,
        label="Prompt",
        info="<lora:name:strength>, also te= unet= lbw= start= stop= step= and 0@0,1@0.4. Ctrl+Up and Ctrl+Down change the "
        "strength under the cursor, Ctrl+Enter and Shift+Enter compose.",
        lines=2,
        max_length=5000,
        elem_id="prompt",
    )
    page.line = gr.Markdown("", elem_id="problem", elem_classes="status")
    page.controls["negative"] = gr.Textbox(
        page.defaults.negative, label="Negative prompt", max_length=5000, elem_id="negative"
    )

    def second() -> dict[str, Any]:
        """Seen where the base model has two text encoders; hidden and not left out, so that its fields keep their values."""
        return {"visible": True if "prompt_2" in prompts_read(page.actions.studio.pipe) else "hidden"}

    with gr.Accordion("Another prompt for the second text encoder", open=False, elem_id="second", **second()) as both:
        for name, label in (("prompt_2", "Second prompt"), ("negative_2", "Second negative prompt")):
            page.controls[name] = gr.Textbox(
                getattr(page.defaults, name), label=label, info="empty: the same", max_length=5000, elem_id=name
            )
    page.lists.append((both, second))
    return page.controls["prompt"]


def _use_picture(page: Page, status: Any) -> None:
    """What becomes of the picture that was clicked, or else of the last one."""
    with gr.Row():
        over = gr.Button("Draw over this", size="sm", elem_id="draw-over-this")
        seed = gr.Button("Use its seed", size="sm", elem_id="use-seed")
    chosen = gr.State("")  # its file

    def choose(request: gr.Request, event: gr.SelectData) -> str:
        return str(page.drawn(request)[event.index].path)

    def picture(request: gr.Request, chosen: str) -> Picture:
        if not (pictures := page.drawn(request)):
            raise ValueError("compose a picture first")
        return next((each for each in pictures if str(each.path) == chosen), pictures[-1])

    @told(3)
    def draw_over_it(request: gr.Request, chosen: str) -> Any:
        return *draw_over.put(picture(request, chosen).path), ""

    @told(2)
    def use_seed(request: gr.Request, chosen: str) -> Any:
        return picture(request, chosen).recipe.seed, ""

    page.pictures.select(choose, None, chosen, **PRIVATE)
    over.click(draw_over_it, chosen, [page.over, page.over_panel, status], **PRIVATE)
    seed.click(use_seed, chosen, [page.controls["seed"], status], **PRIVATE)


def _adding(page: Page, prompt: Any) -> None:
    """Three ways to add a LoRA: by name, found for the prompt, or uploaded; and files that were copied into the folders."""
    catalog = page.actions.studio.catalog
    with gr.Row(equal_height=True):
        add = gr.Dropdown(page.actions.choices(), value=None, label="Add a LoRA", elem_id="add", min_width=120)
        with gr.Column(min_width=120):
            find = gr.Button("Find LoRAs for the prompt", size="sm", elem_id="find")
            upload = gr.UploadButton(
                "Upload a LoRA", file_types=[".safetensors"], type="filepath", size="sm", elem_id="upload"
            )
            again = gr.Button("Look for new files", size="sm", elem_id="look-for-files")
    why = gr.Markdown("", elem_id="why", elem_classes="status")

    def added(names: Iterable[str], text: str, cards: list[MixerCard]) -> Any:
        for name in names:
            if why := page.actions.studio.misfit(name):
                raise ValueError(f"the LoRA {name!r} cannot be used here: {why}")
            text, cards = add_card(text, cards, name, catalog.loras)
        return text, cards, redraw(cards)

    @told(5)
    def chosen(name: str | None, text: str, cards: list[MixerCard]) -> Any:
        return (*added([name] if name else [], text, cards), None, "")

    @told(4)
    def found(text: str, cards: list[MixerCard]) -> Any:
        hits = page.actions.find(parse(text, catalog.loras).text)
        words = "; ".join(f"**{markdown(hit.name)}**: {markdown(hit.why)}" for hit in hits)
        return (*added([hit.name for hit in hits], text, cards), words or "The prompt asks for none of the LoRAs here.")

    @told(4)
    def uploaded(path: str, text: str, cards: list[MixerCard]) -> Any:
        name = page.actions.add_lora(Path(path))
        return (*added([name], text, cards), f"added **{markdown(name)}**")

    def looked_again() -> str:
        return f"new: {markdown(', '.join(names))}" if (names := page.actions.find_loras()) else "no new LoRA files"

    page.lists.append((add, lambda: {"choices": page.actions.choices()}))
    changed = [prompt, page.cards, page.shown]
    find.click(found, [prompt, page.cards], [*changed, why], concurrency_limit=None, **PRIVATE)
    add.input(chosen, [add, prompt, page.cards], [*changed, add, why], **PRIVATE)
    page.added.append(upload.upload(uploaded, [upload, prompt, page.cards], [*changed, why], **PRIVATE))
    page.added.append(again.click(looked_again, None, why, **PRIVATE))


def _settings(page: Page) -> Any:
    """The other fields of a recipe, and the number of pictures, which is returned."""
    d = page.defaults
    with gr.Accordion("Settings", open=True):
        with gr.Row():
            with gr.Column(min_width=120):
                page.controls["seed"] = gr.Number(
                    d.seed, label="Seed", info="-1: another one each time", precision=0, minimum=-1, elem_id="seed"
                )
                new = gr.Button("New seed", size="sm", elem_id="new-seed")
                new.click(lambda: random.randrange(2**32), None, page.controls["seed"], queue=False, **PRIVATE)
            page.controls["steps"] = gr.Slider(1, 150, d.steps, step=1, label="Steps", elem_id="steps")
        with gr.Row():
            page.controls["guidance"] = gr.Slider(*RANGES["guidance"], d.guidance, step=0.1, label="Guidance")
            count = gr.Slider(1, 16, 1, step=1, label="Pictures", info="with consecutive seeds", elem_id="count")
        with gr.Row():
            for name in ("width", "height"):
                page.controls[name] = gr.Number(
                    page.shown_size(d)[name],
                    label=name.capitalize(),
                    info="0: the model's own, or the picture's",
                    precision=0,
                )
        with gr.Row():
            page.controls["sampler"] = gr.Dropdown(
                ["default", *page.actions.studio.samplers], value="default", label="Sampler", elem_id="sampler"
            )
            page.lists.append((page.controls["sampler"], lambda: {"choices": ["default", *page.actions.studio.samplers]}))
            page.controls["gates"] = gr.Dropdown(
                page.gates(),
                value=d.gates,
                label="Gates",
                info="auto: your own for these LoRAs, else the sum",
                elem_id="gates",
            )
            page.controls["binding"] = gr.Dropdown(
                [("automatic", AUTO), (BOUND, BOUND), (TILES, TILES), ("off", "none")],
                value=d.binding,
                label="Binding",
                info="bound: each LoRA on its words, in its place; tiles: drawn there by itself at first; automatic: tiles "
                "where there is room",
                elem_id="binding",
            )
    page.lists.append((page.controls["gates"], lambda: {"choices": page.gates()}))
    return count


def _prompt_changed(page: Page) -> Callable[..., Any]:
    @told(3)
    def changed(prompt: str, cards: list[MixerCard]) -> Any:
        new = cards_of(prompt, cards, page.actions.studio.catalog.loras)
        return (gr.skip(), gr.skip(), "") if new == cards else (new, redraw(new), "")

    return changed
