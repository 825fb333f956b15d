"""Recipe -> the lines of Python that draw the same picture with diffusers."""

from __future__ import annotations

from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import SAMPLERS


def as_code(recipe: Recipe) -> str:
    """A script for a completed recipe. Files are named by what they are called here, without folders."""
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    lines += _pipeline(recipe)
    call = [repr(recipe.text), *_call(recipe)]
    body = f"image = pipe({', '.join(call)}).images[0]"
    if recipe.experts and recipe.arm.startswith("merge "):
        lines += _merged(recipe)
    elif _planned(recipe):
        lines += _mixture(recipe)
        body = f"with mixture.planned(plan):\n    {body}"
    return "\n".join([*lines, body, 'image.save("picture.png")', ""])


def _pipeline(recipe: Recipe) -> list[str]:
    if recipe.base == "emoji":
        lines = ["import mole_diffusers as mole", "", "pipe = mole.emoji_world().pipe"]
    else:
        lines = ["import mole_diffusers as mole", "", f"pipe = DiffusionPipeline.from_pretrained({recipe.base!r})"]
    if recipe.sampler:
        kind, options = SAMPLERS[recipe.sampler]
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        lines += [f"from diffusers import {kind}", f"pipe.scheduler = {kind}.from_config(pipe.scheduler.config{given})"]
    return lines


def _mixture(recipe: Recipe) -> list[str]:
    alone = recipe.arm.partition(" ")[2]
    names = [alone] if alone else sorted(recipe.experts)
    tags = " ".join(str(tag) for tag in recipe.tags if tag.name in names)
    files = ", ".join(f"{name!r}: {f'{name}.safetensors'!r}" for name in names)
    gates = recipe.gates if recipe.arm == "gates" else "sum"
    lines = [
        "from mole_diffusers.studio.block_weights import StrengthSchedule",
        "from mole_diffusers.studio.prompt_syntax import parse",
        "",
        f"mixture = mole.attach(pipe, {{{files}}}, gates={gates!r})",
        f"tags = parse({tags!r}).tags",
    ]
    given = {place: dict(row) for place, row in recipe.locks.items()}
    locks = f", locks={given}" if given else ""
    return [*lines, f"plan = StrengthSchedule(list(mixture.experts), tags, unet=pipe.unet, steps={recipe.steps}{locks})"]


def _call(recipe: Recipe) -> list[str]:
    given = [f"negative_prompt={recipe.negative!r}"] if recipe.negative else []
    given += [f"num_inference_steps={recipe.steps}", f"guidance_scale={recipe.guidance!r}"]
    given += [
        f"width={recipe.width}",
        f"height={recipe.height}",
        f'generator=torch.Generator("cpu").manual_seed({recipe.seed})',
    ]
    return given + (["callback_on_step_end=plan.on_step()"] if _planned(recipe) else [])


def _planned(recipe: Recipe) -> bool:
    """Whether there are gates and tags at work: neither the base alone nor a merge."""
    return bool(recipe.experts) and recipe.arm != "base" and not recipe.arm.startswith("merge ")


def _merged(recipe: Recipe) -> list[str]:
    files = {name: (f"{name}.safetensors", strength) for name, strength in sorted(recipe.constant_strengths().items())}
    return [
        "",
        f"merged = mole.merge({files}, {recipe.arm.partition(' ')[2]!r})",
        'mole.attach(pipe, {"merged": merged}, gates="sum")',
    ]
