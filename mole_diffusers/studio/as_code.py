"""Recipe -> Python code that draws the same picture with diffusers."""

from __future__ import annotations

from typing import Any

from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import SAMPLERS


def as_code(recipe: Recipe) -> str:
    """A script for a completed recipe. LoRA files have their names here, without folders."""
    lines = [*_pipeline(recipe), ""]
    kind, _, about = recipe.arm.partition(" ")
    callback, indent = "", ""
    if recipe.experts and kind == "merge":
        files = {name: (f"{name}.safetensors", weight) for name, weight in sorted(recipe.constant_strengths().items())}
        lines += [f"merged = mole.merge({files}, {about!r})", 'mole.attach(pipe, {"merged": merged}, gates="sum")']
    elif recipe.experts and kind != "base":
        lines += _mixture(recipe, [about] if kind == "alone" else sorted(recipe.experts))
        lines.append("with mixture.planned(schedule):")
        callback, indent = "callback_on_step_end=schedule.on_step()", "    "
    arguments = [
        repr(recipe.text),
        f"negative_prompt={recipe.negative!r}" if recipe.negative else "",
        f"num_inference_steps={recipe.steps}",
        f"guidance_scale={recipe.guidance!r}",
        f"width={recipe.width}",
        f"height={recipe.height}",
        f'generator=torch.Generator("cpu").manual_seed({recipe.seed})',
        callback,
    ]
    lines.append(f"{indent}image = pipe({', '.join(filter(None, arguments))}).images[0]")
    return "\n".join([*lines, 'image.save("picture.png")', ""])


def _pipeline(recipe: Recipe) -> list[str]:
    lines = ["import torch", "from diffusers import DiffusionPipeline", "import mole_diffusers as mole", ""]
    if recipe.base == "emoji":
        lines.append("pipe = mole.emoji_world().pipe")
    else:
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({recipe.base!r})")
    if recipe.sampler:
        kind, options = SAMPLERS[recipe.sampler]
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        lines += [f"from diffusers import {kind}", f"pipe.scheduler = {kind}.from_config(pipe.scheduler.config{given})"]
    return lines


def _mixture(recipe: Recipe, names: list[str]) -> list[str]:
    """Lines that attach these LoRAs and make the schedule of their tags."""
    files = {name: f"{name}.safetensors" for name in names}
    tags = " ".join(str(tag) for tag in recipe.tags if tag.name in names)
    gates = recipe.gates if recipe.arm == "gates" else "sum"
    locks = {place: dict(row) for place, row in recipe.locks.items()}
    given = f", locks={locks}" if locks else ""
    binding: Any = {name: bound for name, bound in recipe.tag_bindings().items() if name in names} or "auto"
    if recipe.binding == "none" or recipe.arm != "gates":
        binding = None
    return [
        "from mole_diffusers.studio.prompt_syntax import parse",
        "from mole_diffusers.studio.strength_schedule import StrengthSchedule",
        "",
        f"mixture = mole.attach(pipe, {files}, gates={gates!r}, binding={binding!r})",
        f"tags = parse({tags!r}).tags",
        f"schedule = StrengthSchedule(list(mixture.experts), tags, unet=pipe.unet, steps={recipe.steps}{given})",
    ]
