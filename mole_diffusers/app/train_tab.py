"""The Train tab: gates for the LoRAs of the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusers.app.gate_files import given_out
from mole_diffusers.app.mixer import plainly
from mole_diffusers.app.page import PRIVATE, QUEUE, Page, gallery, picture, say, say_while, session, stoppable
from mole_diffusers.app.teaching import TRAINED, WAYS, Wanted, curve, teach
from mole_diffusers.studio.catalog import UNTRAINED
from mole_diffusers.studio.prompt_syntax import parse


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    gr.Markdown("Gates for the LoRAs of the prompt, from prompts alone: no pictures are needed. A stopped run goes on.")
    with gr.Row(elem_classes="phone-column"):
        with gr.Column():
            fields = _fields(page)
            suggest = gr.Button("Suggest from the prompt", size="sm", elem_id="suggest")
            with gr.Row():
                train = gr.Button("Train", variant="primary", elem_id="train")
                cancel = gr.Button("Stop", elem_id="train-stop")
            status = gr.Markdown("", elem_id="train-status", elem_classes="status")
        with gr.Column():
            loss = picture("Loss", elem_id="loss")
            pictures = gallery("The prompt's picture on the way", columns=4, elem_id="validation")
            kept = _keeping(page)
    prompt = page.controls["prompt"]
    suggest.click(_suggested(page), prompt, fields[:3], **PRIVATE)
    outputs = [status, loss, pictures, page.controls["gates"], kept]
    work = train.click(_trained(page), [*page.inputs, *fields], outputs, **QUEUE, **PRIVATE)
    stoppable(page, cancel, status, [work])


def _fields(page: Page) -> list[Any]:
    name = gr.Textbox(label="Name of the gates", max_length=60, elem_id="gates-name")
    singles = gr.Textbox(
        label="Prompts of one LoRA each", info="a line each: NAME=PROMPT", lines=4, max_length=5000, elem_id="singles"
    )
    composed = gr.Textbox(label="Prompts with all of them", info="a line each", lines=2, max_length=5000, elem_id="composed")
    styles = gr.Dropdown(
        list(page.actions.studio.catalog.loras), value=[], multiselect=True, label="Styles", info="they act everywhere"
    )
    steps = gr.Slider(1, 500, 60, step=1, label="Updates", elem_id="updates")
    with gr.Row():
        family = gr.Dropdown(TRAINED, value="flow", label="Gates", info="flow weighs token by token", elem_id="family")
        about = "collage: subjects side by side; blend: predictions under masks"
        way = gr.Dropdown(WAYS, value="collage", label="Taught by", info=about, elem_id="way")
    return [name, singles, composed, styles, steps, family, way]


def _keeping(page: Page) -> Any:
    """Gates as files, in and out; the list of gates that there are."""
    catalog = page.actions.studio.catalog
    with gr.Accordion("Gates as files", open=False, elem_id="gate-files"):
        with gr.Row():
            which = gr.Dropdown(list(catalog.gates), value=None, label="Gates", elem_id="which-gates")
            out = gr.Button("Give me the files", size="sm", elem_id="gates-out")
        files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="gates-given")
        with gr.Row():
            name = gr.Textbox(label="Their name here", info="empty: that of their LoRAs", max_length=60, elem_id="new-name")
            taken = gr.UploadButton(
                "Upload gates: .safetensors and .json",
                file_types=[".safetensors", ".json"],
                file_count="multiple",
                type="filepath",
                size="sm",
                elem_id="gates-in",
            )
        told = gr.Markdown("", elem_id="gates-told", elem_classes="status")

    @say
    def given(name: str | None) -> list[str]:
        return [str(path) for path in given_out(catalog, name or "", page.actions.folder)]

    @say
    def took(paths: list[str], name: str) -> Any:
        found = page.actions.add_gates([Path(path) for path in paths], name or "")
        return told_of(found), *choices(page, found["name"])

    out.click(given, which, files, **PRIVATE)
    taken.upload(took, [taken, name], [told, page.controls["gates"], which], **PRIVATE)
    return which


def told_of(found: dict[str, Any]) -> str:
    """Uploaded gates in words, as Markdown."""
    words = f"{found['family']} gates **{plainly(found['name'])}** for {plainly(', '.join(found['experts']))}"
    for key, said in (("other_files", "were trained with another file of"), ("missing", "weigh LoRAs that are not here:")):
        words += f"; they {said} {plainly(', '.join(found[key]))}" if found[key] else ""
    return words


def choices(page: Page, name: str) -> tuple[Any, Any]:
    """Both lists of gates after `name` has come."""
    known = list(page.actions.studio.catalog.gates)
    return gr.update(choices=["auto", *UNTRAINED, *known], value=name), gr.update(choices=known, value=name)


def _suggested(page: Page) -> Callable[[str], Any]:
    catalog = page.actions.studio.catalog

    @say
    def suggested(prompt: str) -> Any:
        parsed = parse(prompt, catalog.loras)
        names = sorted(tag.name for tag in parsed.tags)
        calls = {name: [name, *catalog.expert(name).triggers] for name in names}
        lines = []
        for name in names:
            others = [call for other in names if other != name for call in calls[other]]
            lines.append(f"{name}={alone(parsed.text, others, keep=calls[name])}")
        return "+".join(names), "\n".join(lines), parsed.text

    return suggested


def alone(text: str, others: Collection[str], *, keep: Collection[str]) -> str:
    """A first guess at one LoRA's prompt: the whole one without what calls the others, and the articles and "and" there.

    A word that also calls the LoRA itself stays.
    """
    kept = {call.lower() for call in keep}
    for other in sorted((call for call in others if call.lower() not in kept), key=len, reverse=True):
        text = re.sub(rf"(,|\band\b)?\s*(\b(an?|the)\s+)?(?<!\w){re.escape(other)}(?!\w)", " ", text, flags=re.I)
    text = re.sub(r"\b(of|with|in)\s+(and|,)\s", r"\1 ", " ".join(text.split()))
    return re.sub(r"^(and|,)\s+|\s+(and|of|with|in|,)$", "", text).strip()


def _trained(page: Page) -> Callable[..., Iterator[Any]]:
    @say_while
    def trained(request: gr.Request, *values: Any) -> Iterator[Any]:
        *given, name, singles, composed, styles, steps, family, way = values
        asked = {"styles": styles or [], "steps": int(steps), "family": family, "way": way}
        wanted = Wanted(name or "", lines_of(singles), _lines(composed), **asked)
        with page.stops.job(session(request)) as stopped:
            state = None
            for state in teach(page.actions.studio, page.recipe(*given), wanted, home=page.actions.home, stopped=stopped):
                yield str(state), curve(state.rows), state.pictures, gr.skip(), gr.skip()
            if state is not None and state.finished:
                yield str(state), curve(state.rows), state.pictures, *choices(page, wanted.name)
            else:
                yield f"stopped; {state}", *[gr.skip()] * 4

    return trained


def lines_of(text: str) -> dict[str, list[str]]:
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
