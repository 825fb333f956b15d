"""The page's components for the fields of a recipe, of a training and of a LoRA's card."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from mole_app.studio.block_weights import PRESETS
from mole_app.studio.prompt_syntax import PAINTED
from mole_app.studio.recipe import BINDINGS, RANGES
from mole_app.web.gate_training import TRAINED, WAYS
from mole_diffusers.binding import AUTO, BOXES, EVERYWHERE
from mole_diffusers.gates import GATE_TYPES, RECOMMENDED

SECOND, SIDE = "of the second text encoder; empty: the same", "0: the model's own"
SWITCH = (AUTO, EVERYWHERE, PAINTED)  # where a LoRA acts
text, number = partial(gr.Textbox, max_length=5000), partial(gr.Number, precision=0)
choice, typed = gr.Dropdown, partial(gr.Dropdown, allow_custom_value=True)


def slider(name: str, step: float, label: str, info: str | None = None) -> Callable[..., Any]:
    """A slider over the whole range of a field of a Recipe."""
    return partial(gr.Slider, *RANGES[name], step=step, label=label, info=info)


CONTROLS: dict[str, Callable[..., Any]] = {  # field of a Recipe -> its component
    "prompt": partial(
        text,
        label="Prompt",
        show_label=False,
        container=False,
        lines=3,
        max_lines=6,
        placeholder="What is in the picture? A red fox and a cat with a hat, ink drawing",
    ),
    "negative": partial(
        text,
        label="Negative prompt",
        show_label=False,
        container=False,
        lines=1,
        max_lines=3,
        placeholder="What should not be in it",
    ),
    "prompt_2": partial(text, label="Prompt 2", info=SECOND),
    "negative_2": partial(text, label="Negative 2", info=SECOND),
    "seed": partial(number, label="Seed", info="-1: another one each time", minimum=-1),
    "steps": slider("steps", 1, "Steps"),
    "guidance": slider("guidance", 0.1, "Guidance (CFG scale)"),
    "width": partial(number, label="Width", info=SIDE),
    "height": partial(number, label="Height", info=SIDE),
    "sampler": partial(choice, label="Sampler"),
    "gates": partial(choice, label="Gates", info="auto: your own for these LoRAs, else the sum"),
    "binding": partial(
        choice,
        BINDINGS,
        label="Binding",
        info="bound: each LoRA on its words, in its place; tiles: in some steps also drawn there by "
        "itself; auto: tiles where there is room",
    ),
    "clip_skip": slider("clip_skip", 1, "Clip skip", "1: all layers; many checkpoints for drawings want 2"),
    "controlnet": partial(choice, label="ControlNet", info="reads the map"),
    "control_strength": slider("control_strength", 0.05, "Control strength"),
    "control_end": slider("control_end", 0.05, "Control end", "share of the steps after which the map counts no more"),
    "ip_adapter": partial(choice, label="IP-Adapter", info="reads the reference picture"),
    "ip_scale": slider("ip_scale", 0.05, "IP scale", "how much the reference counts"),
    "strength": slider("strength", 0.05, "Strength (denoising)", "how much of the picture is drawn anew"),
    "hires": slider("hires", 0.25, "Hires: times larger", "drawn over at this size"),
    "hires_strength": slider("hires_strength", 0.05, "Hires strength", "denoising of that pass"),
    "upscaler": partial(text, label="Upscaler", info="enlarges for hires: a file of the upscalers' folder; empty: none"),
    "detail": slider("detail", 0.05, "Detail of each subject", "its place is drawn over once more, enlarged; 0: not"),
}
TRAINING: dict[str, Callable[..., Any]] = {  # field of a TrainingRequest -> its component
    "name": partial(gr.Textbox, label="Name of the gates", max_length=60),
    "singles": partial(
        text,
        label="Singles: prompts of one LoRA each",
        info="one per line: NAME=PROMPT; for a collage, of a subject in the style",
        lines=4,
    ),
    "composed": partial(text, label="Composed: prompts with all of them", info="one per line", lines=2),
    "styles": partial(choice, value=[], multiselect=True, label="Styles", info="they act everywhere"),
    "steps": partial(gr.Slider, 1, 500, 60, step=1, label="Steps (updates)"),
    "gate_type": partial(
        choice,
        TRAINED,
        value=RECOMMENDED,
        label="Gate type",
        info=f"{RECOMMENDED}: {(GATE_TYPES[RECOMMENDED].__doc__ or '').partition(chr(10))[0]}",
    ),
    "way": partial(
        choice,
        WAYS,
        value="collage",
        label="Way of teaching",
        info="collage: subjects side by side; blend: predictions under masks",
    ),
}
CARD: dict[str, Callable[..., Any]] = {  # field of a LoRA's tag -> its component
    "word": partial(typed, multiselect=True, label="Its words in the prompt", elem_classes="word"),
    "region": partial(
        typed,
        [*SWITCH, *BOXES],
        label="Where it acts",
        info="or a box, 0,0,0.5,1: left, top, right, bottom",
        elem_classes="region",
    ),
    "te": partial(gr.Textbox, label="Text encoder (te)", max_length=500),
    "lbw": partial(typed, ["", *PRESETS, "ALL0.5"], label="Blocks (lbw)"),
    "start": partial(gr.Textbox, label="From step (start)", max_length=10),
    "stop": partial(gr.Textbox, label="To step (stop)", max_length=10),
}
