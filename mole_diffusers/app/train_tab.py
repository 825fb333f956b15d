"""The Train tab: gates for the LoRAs of the prompt."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app.files import export_gates
from mole_diffusers.app.gate_training import TRAINED, WAYS, TrainingProgress, TrainingRequest, train
from mole_diffusers.app.interrupted import Offer, offer, read
from mole_diffusers.app.jobs import Job, Work
from mole_diffusers.app.page import (
    PRIVATE,
    USER_ERRORS,
    Page,
    connect_cancel,
    connect_job,
    figure,
    gallery,
    markdown,
    told,
)
from mole_diffusers.app.training_runs import AGAIN, GatesExistError
from mole_diffusers.studio.prompt_syntax import parse
from mole_diffusers.studio.recipe import Recipe


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    gr.Markdown(
        "Train gates for the LoRAs of the prompt, from prompts alone: no pictures are needed. A stopped run can go on."
    )
    with gr.Row(elem_classes="phone-column"):
        with gr.Column():
            fields = _fields(page)
            with gr.Row():
                start = gr.Button("Train", variant="primary", elem_id="train")
                cancel = gr.Button("Stop", elem_id="train-stop")
            with gr.Row(visible=False, elem_id="again") as asked:
                more = gr.Button("Continue from these gates", size="sm", elem_id="train-more")
                over = gr.Button("Overwrite them", size="sm", elem_id="train-over")
            status = gr.Markdown("", elem_id="train-status", elem_classes="status")
            offer = _offer(page)
        with gr.Column():
            loss = figure("Loss", elem_id="loss")
            pictures = gallery("The prompt's picture before, during and after", columns=4, elem_id="validation")
            saved = _gate_files(page)
    page.fields += fields
    again = gr.State("")

    def plan(*values: Any) -> Work:
        recipe, wanted, again = _asked(page, *values)
        return train(page.actions.studio, recipe, wanted, home=page.actions.home, again=again)

    def show(job: Job) -> list[Any]:
        progress: TrainingProgress = job.event
        is_new = job.state == "done" and not job.is_shown  # after a reload, what was chosen since then stays
        choices = _gate_choices(page, progress.name) if is_new else (None, None)
        return [progress.curve(), progress.pictures, *choices]

    def ask(*values: Any) -> Any:
        """Whether to ask what becomes of gates that are there, and the answer so far: none."""
        try:
            plan(*values)
        except GatesExistError:
            return gr.update(visible=True), ""
        except USER_ERRORS:  # which the job says
            pass
        return gr.update(visible=False), ""

    inputs = [*page.inputs, *fields]
    hidden = gr.update(visible=False)
    answers = [
        button.click(lambda answer=answer: (hidden, answer), None, [asked, again], **PRIVATE)  # type: ignore[misc]
        for button, answer in ((more, AGAIN[0]), (over, AGAIN[1]))
    ]
    asking = start.click(ask, [*inputs, again], [asked, again], **PRIVATE)
    begins, outputs = [event.then for event in (asking, *answers)], [loss, pictures, page.controls["gates"], saved]
    connect_job(page, "train", begins, plan, show, inputs=[*inputs, again], status=status, outputs=outputs, offer=offer)
    connect_cancel(page, cancel, status, ["train"])


def _asked(page: Page, *values: Any) -> tuple[Recipe, TrainingRequest, str]:
    """What the page asks for: the recipe, the training, and what becomes of gates that are there."""
    *given, name, singles, composed, styles, steps, family, way, again = values
    options = {"styles": styles or [], "steps": int(steps), "family": family, "way": way}
    return page.recipe(*given), TrainingRequest(name or "", parse_singles(singles), _lines(composed), **options), again


def _offer(page: Page) -> Offer:
    """Of trainings that ran or waited when the app ended. They go on from their last checkpoint."""
    actions = page.actions

    def keep(*values: Any) -> dict[str, Any]:
        recipe, wanted, again = _asked(page, *values)
        return {"recipe": replace(recipe, base=actions.studio.base).to_dict(), "training": asdict(wanted), "again": again}

    def describe(kept: dict[str, Any]) -> str:
        return f"The training **{markdown(TrainingRequest(**kept['training']).name)}**"

    def plan(path: Path) -> Work:
        kept = read(
            path, lambda kept: (Recipe.from_dict(kept["recipe"]), TrainingRequest(**kept["training"]), kept["again"])
        )
        recipe, wanted, again = kept
        actions.check_base(recipe.base, "change it first")
        try:
            return train(actions.studio, recipe, wanted, home=actions.home)
        except GatesExistError:  # it had not begun
            return train(actions.studio, recipe, wanted, home=actions.home, again=again)

    return offer(page.visitor, page.interrupted, "train", "Go on", describe, keep=keep, plan=plan)


def _fields(page: Page) -> list[Any]:
    """The fields of a TrainingRequest, and the button that fills them from the prompt."""
    catalog = page.actions.studio.catalog
    name = gr.Textbox(label="Name of the gates", max_length=60, elem_id="gates-name")
    singles = gr.Textbox(
        label="Prompts of one LoRA each",
        info="one per line: NAME=PROMPT; for a collage, of a subject in the style",
        lines=4,
        max_length=5000,
        elem_id="singles",
    )
    composed = gr.Textbox(
        label="Prompts with all of them", info="one per line", lines=2, max_length=5000, elem_id="composed"
    )
    styles = gr.Dropdown(list(catalog.loras), value=[], multiselect=True, label="Styles", info="they act everywhere")
    page.lists.append((styles, lambda: {"choices": list(catalog.loras)}))
    steps = gr.Slider(1, 500, 60, step=1, label="Updates", elem_id="updates")
    with gr.Row():
        family = gr.Dropdown(
            TRAINED,
            value="factors",
            label="Gates",
            info="factors weigh each rank of a LoRA, flow each token",
            elem_id="family",
        )
        about = "collage: subjects side by side; blend: predictions under masks"
        way = gr.Dropdown(WAYS, value="collage", label="Taught by", info=about, elem_id="way")
    suggest = gr.Button("Suggest from the prompt", size="sm", elem_id="suggest")
    why = gr.Markdown("", elem_classes="status")

    @told(4)
    def suggestion(prompt: str, styles: Sequence[str], way: str) -> Any:
        parsed = parse(prompt, catalog.loras)
        words = {tag.name: [tag.name, *catalog.expert(tag.name).triggers] for tag in parsed.tags}
        shared = styles if way == "collage" else []  # each subject of a collage is drawn in the style
        lines = [f"{name}={own}" for name, own in single_prompts(parsed.text, words, shared).items()]
        return "+".join(sorted(words)), "\n".join(lines), parsed.text, ""

    suggest.click(suggestion, [page.controls["prompt"], styles, way], [name, singles, composed, why], **PRIVATE)
    return [name, singles, composed, styles, steps, family, way]


def single_prompts(text: str, words: Mapping[str, Sequence[str]], shared: Collection[str] = ()) -> dict[str, str]:
    """A first guess at the prompt of each LoRA: the whole one without the words of the others, but of those in `shared`."""
    found = {}
    for name in sorted(words):
        others = [word for other in words if other != name and other not in shared for word in words[other]]
        found[name] = single_prompt(text, others, keep=words[name])
    return found


def single_prompt(text: str, others: Collection[str], *, keep: Collection[str]) -> str:
    """A first guess at one LoRA's prompt: the whole one without the other LoRAs' names and triggers, and without the
    articles and "and" before them.

    Args:
        others: words of the other LoRAs.
        keep: words of this LoRA, which stay.
    """
    kept = {word.lower() for word in keep}
    for other in sorted((word for word in others if word.lower() not in kept), key=len, reverse=True):
        text = re.sub(rf"(,|\band\b)?\s*(\b(an?|the)\s+)?(?<!\w){re.escape(other)}(?!\w)", " ", text, flags=re.I)
    text = re.sub(r"\b(of|with|in)\s+(and|,)\s", r"\1 ", " ".join(text.split()))
    return re.sub(r"^(and|,)\s+|\s+(and|of|with|in|,)$", "", text).strip()


def parse_singles(text: str) -> dict[str, list[str]]:
    """Lines of NAME=PROMPT -> prompts by LoRA. Raises ValueError for a line of another form."""
    singles: dict[str, list[str]] = {}
    for line in _lines(text):
        name, equals, prompt = line.partition("=")
        if not equals or not prompt.strip():
            raise ValueError(f"the line {line!r} is not NAME=PROMPT")
        singles.setdefault(name.strip(), []).append(prompt.strip())
    return singles


def _lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _gate_files(page: Page) -> Any:
    """Download and upload of trained gates; returns the choice of gates."""
    catalog = page.actions.studio.catalog
    with gr.Accordion("Gates as files", open=False, elem_id="gate-files"):
        with gr.Row():
            which = gr.Dropdown(list(catalog.gates), value=None, label="Gates", elem_id="which-gates")
            download = gr.Button("Download", size="sm", elem_id="gates-out")
        files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="gates-given")
        with gr.Row():
            name = gr.Textbox(label="Their name here", info="empty: the LoRAs' names", max_length=60, elem_id="new-name")
            upload = gr.UploadButton(
                "Upload gates: .safetensors and .json",
                file_types=[".safetensors", ".json"],
                file_count="multiple",
                type="filepath",
                size="sm",
                elem_id="gates-in",
            )
        status = gr.Markdown("", elem_id="gates-told", elem_classes="status")

    @told(2)
    def downloaded(name: str | None) -> tuple[list[str], str]:
        return [str(path) for path in export_gates(catalog, name or "", page.actions.downloads)], ""

    @told(3)
    def uploaded(paths: list[str], name: str) -> Any:
        found = page.actions.add_gates([Path(path) for path in paths], name or "")
        words = f"{found['family']} gates **{markdown(found['name'])}** for {markdown(', '.join(found['experts']))}"
        if found["other_files"]:
            words += f"; they were trained with another file of {markdown(', '.join(found['other_files']))}"
        if found["missing"]:
            words += f"; LoRAs that are not here: {markdown(', '.join(found['missing']))}"
        return *_gate_choices(page, found["name"]), words

    page.lists.append((which, lambda: {"choices": list(catalog.gates)}))
    download.click(downloaded, which, [files, status], **PRIVATE)
    upload.upload(uploaded, [upload, name], [page.controls["gates"], which, status], **PRIVATE)
    return which


def _gate_choices(page: Page, name: str) -> tuple[Any, Any]:
    """Updates of both choices of gates after `name` was added."""
    known = list(page.actions.studio.catalog.gates)
    return gr.update(choices=page.gates(), value=name), gr.update(choices=known, value=name)
