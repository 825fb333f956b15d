"""The Train tab: gates for the LoRAs of the prompt."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from mole_app.studio.recipe import Recipe
from mole_app.studio.weight_syntax import plain_text
from mole_app.web.files import GATES, default_gates_name, export_gates
from mole_app.web.gate_training import TrainingProgress, TrainingRequest
from mole_app.web.jobs import Job, Work
from mole_app.web.mixer_cards import parse_named
from mole_app.web.page import Page
from mole_app.web.page_jobs import buttons, connect_job
from mole_app.web.sentences import errors_to, markdown
from mole_app.web.style import Values, figure, gallery, row, status_line
from mole_app.web.training_runs import AGAIN, GatesExistError
from mole_diffusers.binding import AUTO, EVERYWHERE, Bound, bindings, files_bindings, parse_phrases, read_prompt
from mole_diffusers.inspection import losses


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    gr.Markdown(
        "Teaches the LoRAs of your prompt to get along, from prompts alone: no pictures are needed. Press “Suggest from the "
        "prompt” first. A stopped run can go on."
    )
    with gr.Row(elem_classes="phone-column"):
        with gr.Column():
            _fields(page)
            start, status = buttons(page, "train", "Train", "Stop")
            with gr.Row(visible=False, elem_id="again") as asked:
                more = gr.Button("Continue from these gates", size="sm", elem_id="train-more")
                over = gr.Button("Overwrite them", size="sm", elem_id="train-over")
        with gr.Column():
            loss = figure(label="Loss", visible=False, elem_id="loss")
            label = "The prompt's picture before, during and after"
            pictures = gallery(label=label, columns=4, visible=False, elem_id="validation")
            _gate_files(page)
    again, hidden = gr.State(""), gr.update(visible=False)

    def work_of(recipe: Recipe, *given: Any) -> Work:
        *values, again, _ = given
        return page.actions.train(recipe, _request(page, values), again)

    def show(job: Job) -> Values:
        progress: TrainingProgress = job.event
        curve = losses(progress.rows) if progress.rows else None
        shown: Values = {asked: hidden, again: "", loss: gr.update(value=curve, visible=curve is not None)}
        shown[pictures] = gr.update(value=progress.pictures, visible=bool(progress.pictures))
        is_new = job.state == "done" and not job.is_shown  # after a reload, keep what was chosen since then
        return shown | (_chosen(page, progress.request.name) if is_new else {})

    def refused(error: Exception) -> Values:
        return {asked: gr.update(visible=isinstance(error, GatesExistError)), again: ""}

    begins: list[Any] = [start.click]
    for button, answer in zip((more, over), AGAIN, strict=True):
        begins.append(button.click(lambda answer=answer: (hidden, answer), None, [asked, again]).then)  # type: ignore[misc]
    outputs = [status, loss, pictures, page.form.controls["gates"], page.form.more["trained"], asked, again]
    inputs = [*page.form.training.values(), again]
    connect_job(page, "train", begins, work_of, show, outputs, more=inputs, draws=False, refused=refused)


def _request(page: Page, values: Sequence[Any]) -> TrainingRequest:
    """The training that the fields ask for."""
    wanted = dict(zip(page.form.training, values, strict=True))
    wanted |= {"name": wanted["name"] or "", "styles": wanted["styles"] or []}
    wanted |= {"singles": parse_singles(wanted["singles"]), "composed": _lines(wanted["composed"])}
    return TrainingRequest(**wanted)


def _fields(page: Page) -> None:
    """The fields of a TrainingRequest, and the button that fills them from the prompt."""
    catalog, fields, prompt = page.actions.studio.catalog, page.form.training, page.prompt.text
    for name in ("name", "singles", "composed", "styles", "steps"):
        fields[name].render()
    row(fields["gate_type"], fields["way"])
    suggest = gr.Button("Suggest from the prompt", size="sm", elem_id="suggest")
    why = status_line(elem_id="suggest-status")

    @errors_to(why)
    def suggestion(text: str, styles: Sequence[str], way: str) -> Values:
        parsed = parse_named(text, catalog.loras)
        experts = {tag.name: catalog.expert(tag.name) for tag in parsed.tags}
        text, everywhere = plain_text(parsed.text), [tag.name for tag in parsed.tags if tag.region == EVERYWHERE]
        own = bindings({tag.name: (parse_phrases(tag.word), AUTO) for tag in parsed.tags}, files_bindings(experts), {})
        singles, found, silent = suggested(text, own, [*styles, *everywhere], way)
        names = ", ".join(f"**{markdown(name)}**" for name in found if name not in styles)
        words = [f"added to Styles, which act on the whole picture: {names}"] if names else []
        words += [f"the prompt has none of the words of **{markdown(name)}**: write them in" for name in silent]
        return {
            fields["name"]: default_gates_name(experts),
            fields["singles"]: "\n".join(f"{name}={own}" for name, prompts in singles.items() for own in prompts),
            fields["composed"]: text,
            fields["styles"]: page.form.chosen(fields["styles"], found),
            why: "; ".join(words),
        }

    filled = [*(fields[name] for name in ("name", "singles", "composed", "styles")), why]
    suggest.click(suggestion, [prompt, fields["styles"], fields["way"]], filled)


def suggested(
    text: str, own: Mapping[str, Bound], styles: Collection[str], way: str
) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Suggest what to train on, reading the prompt as binding does.

    Returns the prompts of each LoRA, the styles, and the LoRAs that the prompt does not name. For a collage, each subject
    has a prompt with all styles: "ink drawing of an owl" for "ink drawing of a red fox and an owl". They are in the order in
    which the prompt names the subjects, from left to right. Otherwise every LoRA has one prompt, without the words of the
    others.

    Args:
        text: the prompt, without tags and weights.
        own: how each LoRA is bound.
        styles: known styles. LoRAs whose words describe the whole picture become styles, too.
    """
    bound = {}
    for name, each in own.items():
        words = each.words or (name,)  # as in `training.context.triggers`
        bound[name] = Bound(words, EVERYWHERE if name in styles else AUTO)
    sentence, names = read_prompt(text, list(bound.values()), [True] * len(bound)), list(bound)
    found = [name for k, name in enumerate(names) if k in sentence.styles or name in styles]
    silent = [name for name, said in zip(names, sentence.mentioned, strict=True) if not said and name not in found]
    others = {name: [word for other in bound if other != name for word in bound[other].words] for name in bound}
    if way == "collage":
        subjects: dict[str, list[str]] = {}
        for subject, part in zip(sentence.subjects, sentence.parts, strict=False):  # the listed ones come first
            for k in subject.experts:
                subjects.setdefault(names[k], []).append(part.text)
        for name in names:  # those that the prompt does not list side by side
            if name not in (*subjects, *found, *silent):
                rest = [word for other in names if other not in (name, *found) for word in bound[other].words]
                subjects[name] = [single_prompt(text, rest, keep=bound[name].words)]
        return subjects, found, silent
    return {name: [single_prompt(text, others[name], keep=bound[name].words)] for name in bound}, found, silent


def single_prompt(text: str, others: Collection[str], *, keep: Collection[str]) -> str:
    """Suggest a prompt for one LoRA: the whole prompt without the names and triggers of the other LoRAs, and without the
    articles and "and" before these.

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
    """Parse lines of NAME=PROMPT into {LoRA: its prompts}. Raises ValueError for other lines."""
    singles: dict[str, list[str]] = {}
    for line in _lines(text):
        name, equals, prompt = line.partition("=")
        if not equals or not prompt.strip():
            raise ValueError(f"the line {line!r} is not NAME=PROMPT")
        singles.setdefault(name.strip(), []).append(prompt.strip())
    return singles


def _lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _gate_files(page: Page) -> None:
    """Lay out the download and upload of trained gates."""
    catalog, which = page.actions.studio.catalog, page.form.more["trained"]
    with gr.Accordion("Gates as files", open=False, elem_id="gate-files"):
        with gr.Row():
            which.render()
            download = gr.Button("Download", size="sm", elem_id="gates-out")
        files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="gates-given")
        with gr.Row():
            name = gr.Textbox(label="Their name here", info="empty: the LoRAs' names", max_length=60, elem_id="new-name")
            two: dict[str, Any] = {"file_types": list(GATES), "file_count": "multiple"}
            upload = gr.UploadButton("Upload gates: .safetensors and .json", size="sm", elem_id="gates-in", **two)
        status = status_line(elem_id="gates-told")

    @errors_to(status)
    def downloaded(name: str | None) -> Values:
        return {files: [str(path) for path in export_gates(catalog, name or "", page.actions.new_folder())]}

    @errors_to(status)
    def uploaded(paths: list[str], name: str) -> Values:
        found = page.actions.add_gates([Path(path) for path in paths], name or "")
        words = f"{found['gate_type']} gates **{markdown(found['name'])}** for {markdown(', '.join(found['experts']))}"
        if found["other_files"]:
            words += f"; they were trained with another file of {markdown(', '.join(found['other_files']))}"
        if found["missing"]:
            words += f"; LoRAs that are not here: {markdown(', '.join(found['missing']))}"
        return _chosen(page, found["name"]) | {status: words}

    download.click(downloaded, which, [files, status])
    upload.upload(uploaded, [upload, name], [page.form.controls["gates"], which, status])


def _chosen(page: Page, name: str) -> Values:
    """Updates for both choices of gates after `name` was added."""
    return {field: page.form.chosen(field, name) for field in (page.form.controls["gates"], page.form.more["trained"])}
