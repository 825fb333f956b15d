"""The Train tab: gates for the LoRAs of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from mole_diffusers.app.page import BUTTONS, PRIVATE, QUEUE, Page, say, say_while, session
from mole_diffusers.app.teaching import Wanted, curve, teach
from mole_diffusers.prompt_syntax import parse
from mole_diffusers.shelf import UNTRAINED


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
            loss = gr.Image(
                label="Loss", format="png", interactive=False, buttons=BUTTONS, elem_classes="figure", elem_id="loss"
            )
            pictures = gr.Gallery(
                label="The prompt's picture on the way",
                format="png",
                columns=4,
                height="auto",
                object_fit="contain",
                buttons=BUTTONS,
                interactive=False,
                elem_classes="pixel",
                elem_id="validation",
            )

    def stop(request: gr.Request) -> str:
        return "stopping" if page.stops.stop(session(request)) else "nothing is running"

    prompt = page.controls["prompt"]
    suggest.click(_suggested(page), prompt, fields[:4], **PRIVATE)
    outputs = [status, loss, pictures, page.controls["gates"]]
    train.click(_trained(page), [*page.inputs, *fields], outputs, **QUEUE, **PRIVATE)
    cancel.click(stop, None, status, queue=False, **PRIVATE)


def _fields(page: Page) -> list[Any]:
    name = gr.Textbox(label="Name of the gates", max_length=60, elem_id="gates-name")
    singles = gr.Textbox(
        label="Prompts of one LoRA each", info="a line each: NAME=PROMPT", lines=4, max_length=5000, elem_id="singles"
    )
    composed = gr.Textbox(label="Prompts with all of them", info="a line each", lines=2, max_length=5000, elem_id="composed")
    styles = gr.Dropdown(
        list(page.actions.studio.shelf.loras), value=[], multiselect=True, label="Styles", info="they act everywhere"
    )
    steps = gr.Slider(1, 500, 60, step=1, label="Updates", elem_id="updates")
    return [name, singles, composed, styles, steps]


def _suggested(page: Page) -> Callable[[str], Any]:
    @say
    def suggested(prompt: str) -> Any:
        parsed = parse(prompt, page.actions.studio.shelf.loras)
        names = sorted(tag.name for tag in parsed.tags)
        lines = "\n".join(f"{name}={_without_others(parsed.text, name, names)}" for name in names)
        return "+".join(names), lines, parsed.text, []

    return suggested


def _without_others(text: str, name: str, names: list[str]) -> str:
    """A first guess at one LoRA's prompt: the words without the others' names."""
    for other in names:
        if other != name:
            text = text.replace(f"and a {other}", "").replace(f"and an {other}", "").replace(f"a {other} and", "")
            text = text.replace(f"an {other} and", "").replace(other, "thing")
    return " ".join(text.split())


def _trained(page: Page) -> Callable[..., Iterator[Any]]:
    @say_while
    def trained(request: gr.Request, *values: Any) -> Iterator[Any]:
        *given, name, singles, composed, styles, steps = values
        wanted = Wanted(name or "", lines_of(singles), _lines(composed), styles or [], int(steps))
        with page.stops.job(session(request)) as stopped:
            state = None
            for state in teach(page.actions.studio, page.recipe(*given), wanted, home=page.actions.home, stopped=stopped):
                yield str(state), curve(state.rows), state.pictures, gr.skip()
            if state is not None and state.finished:
                choices = ["auto", *UNTRAINED, *page.actions.studio.shelf.gates]
                yield str(state), curve(state.rows), state.pictures, gr.update(choices=choices, value=wanted.name)
            else:
                yield f"stopped; {state}", gr.skip(), gr.skip(), gr.skip()

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
