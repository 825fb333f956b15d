"""The page's components for the fields of a recipe, of a training and of a LoRA's card."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from mole_diffusers.app.gate_training import TRAINED, WAYS
from mole_diffusers.binding.regions import AUTO, BOXES, EVERYWHERE
from mole_diffusers.studio.block_weights import PRESETS
from mole_diffusers.studio.prompt_syntax import PAINTED
from mole_diffusers.studio.recipe import BOUND, RANGES, TILES

SAME, SIDE = "empty: the same", "0: the model's own"
REGIONS: list[Any] = [("automatic", AUTO), EVERYWHERE, PAINTED, *BOXES]
BINDINGS = [("automatic", AUTO), (BOUND, BOUND), (TILES, TILES), ("none", "none")]
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
    "prompt_2": partial(text, label="Second prompt", info=SAME),
    "negative_2": partial(text, label="Second negative prompt", info=SAME),
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
        "itself; automatic: tiles where there is room",
    ),
    "clip_skip": slider("clip_skip", 1, "Clip skip", "1: all layers; many checkpoints for drawings want 2"),
    "strength": slider("strength", 0.05, "Change (denoising strength)", "how much of the picture is drawn anew"),
    "hires": slider("hires", 0.25, "Larger (hires fix)", "times; drawn over at this size"),
    "hires_strength": slider("hires_strength", 0.05, "Change when larger", "denoising strength of that pass"),
    "upscaler": partial(text, label="Enlarged by", info="a model of the upscalers' folder; empty: interpolated"),
    "detail": slider("detail", 0.05, "Detail of each subject", "its place is drawn over once more, enlarged; 0: not"),
}
TRAINING: dict[str, Callable[..., Any]] = {  # field of a TrainingRequest -> its component
    "name": partial(gr.Textbox, label="Name of the gates", max_length=60),
    "singles": partial(
        text,
        label="Prompts of one LoRA each",
        info="one per line: NAME=PROMPT; for a collage, of a subject in the style",
        lines=4,
    ),
    "composed": partial(text, label="Prompts with all of them", info="one per line", lines=2),
    "styles": partial(choice, value=[], multiselect=True, label="Styles", info="they act everywhere"),
    "steps": partial(gr.Slider, 1, 500, 60, step=1, label="Updates"),
    "family": partial(
        choice, TRAINED, value="factors", label="Kind of gates", info="factors weigh each rank of a LoRA, flow each token"
    ),
    "way": partial(
        choice,
        WAYS,
        value="collage",
        label="Taught by",
        info="collage: subjects side by side; blend: predictions under masks",
    ),
}
CARD: dict[str, Callable[..., Any]] = {  # field of a LoRA's tag -> its component
    "word": partial(typed, multiselect=True, label="Its words in the prompt", elem_classes="word"),
    "region": partial(
        typed, REGIONS, label="Where it acts", info="or a box, 0,0,0.5,1: left, top, right, bottom", elem_classes="region"
    ),
    "te": partial(gr.Textbox, label="Text encoder (te)", max_length=500),
    "lbw": partial(typed, ["", *PRESETS, "ALL0.5"], label="Blocks (lbw)"),
    "start": partial(gr.Textbox, label="From step (start)", max_length=10),
    "stop": partial(gr.Textbox, label="To step (stop)", max_length=10),
}
