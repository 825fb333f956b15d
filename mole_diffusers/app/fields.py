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

SAME, SIDE = "empty: the same", "0: the model's own, or the picture's"
REGIONS: list[Any] = [("found from attention", AUTO), (EVERYWHERE, EVERYWHERE), (f"{PAINTED}, see Regions", PAINTED), *BOXES]
BINDINGS = [("automatic", AUTO), (BOUND, BOUND), (TILES, TILES), ("off", "none")]
text, number = partial(gr.Textbox, max_length=5000), partial(gr.Number, precision=0)
slider, choice, typed = gr.Slider, gr.Dropdown, partial(gr.Dropdown, allow_custom_value=True)

CONTROLS: dict[str, Callable[..., Any]] = {  # field of a Recipe -> its component
    "prompt": partial(
        text,
        label="Prompt",
        info="<lora:name:strength>, also te= unet= lbw= start= stop= step= and 0@0,1@0.4. Ctrl+Up and Ctrl+Down "
        "change the strength under the cursor, Ctrl+Enter and Shift+Enter compose.",
        lines=2,
    ),
    "negative": partial(text, label="Negative prompt"),
    "prompt_2": partial(text, label="Second prompt", info=SAME),
    "negative_2": partial(text, label="Second negative prompt", info=SAME),
    "seed": partial(number, label="Seed", info="-1: another one each time", minimum=-1),
    "steps": partial(slider, *RANGES["steps"], step=1, label="Steps"),
    "guidance": partial(slider, *RANGES["guidance"], step=0.1, label="Guidance (CFG scale)"),
    "width": partial(number, label="Width", info=SIDE),
    "height": partial(number, label="Height", info=SIDE),
    "sampler": partial(choice, label="Sampler"),
    "gates": partial(choice, label="Gates", info="auto: your own for these LoRAs, else the sum"),
    "binding": partial(
        choice,
        BINDINGS,
        label="Binding",
        info="bound: each LoRA on its words, in its place; tiles: drawn there by itself at first; automatic: tiles "
        "where there is room",
    ),
    "clip_skip": partial(
        slider, *RANGES["clip_skip"], step=1, label="Clip skip", info="1: all layers; many checkpoints for drawings want 2"
    ),
    "strength": partial(
        slider,
        *RANGES["strength"],
        step=0.05,
        label="Change (denoising strength)",
        info="how much of the picture is drawn anew",
    ),
    "hires": partial(slider, *RANGES["hires"], step=0.25, label="Larger (hires fix)", info="times; drawn over at this size"),
    "hires_strength": partial(
        slider, *RANGES["hires_strength"], step=0.05, label="Change when larger", info="denoising strength of that pass"
    ),
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
    "steps": partial(slider, 1, 500, 60, step=1, label="Updates"),
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
    "unet": partial(gr.Textbox, label="Any number", max_length=500, elem_classes="any"),
    "word": partial(typed, multiselect=True, label="Its words in the prompt", elem_classes="word"),
    "region": partial(
        typed, REGIONS, label="Where it acts", info="or a box, 0,0,0.5,1: left, top, right, bottom", elem_classes="region"
    ),
    "te": partial(gr.Textbox, label="Text encoder (te)", max_length=500),
    "lbw": partial(typed, ["", *PRESETS, "ALL0.5"], label="Blocks (lbw)"),
    "start": partial(gr.Textbox, label="From step (start)", max_length=10),
    "stop": partial(gr.Textbox, label="To step (stop)", max_length=10),
}
