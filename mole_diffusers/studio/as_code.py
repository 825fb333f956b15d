"""Recipe -> Python code that draws the same picture with diffusers."""

from __future__ import annotations

import ast
from itertools import groupby
from operator import itemgetter

from PIL import Image

from mole_diffusers.binding.as_text import read_mask
from mole_diffusers.binding.regions import AUTO, region_picture
from mole_diffusers.emoji.world import concept_files, gate_folders
from mole_diffusers.patching.host.denoiser_inputs import denoiser
from mole_diffusers.studio.base_models import open_base
from mole_diffusers.studio.catalog import file_hash, gates_hash
from mole_diffusers.studio.clip_skip import clip_skip
from mole_diffusers.studio.names import WORLD
from mole_diffusers.studio.picture_passes import drawable, drawing_over, fitted, on_white, size_arguments, steps_drawn
from mole_diffusers.studio.prompt_syntax import parse
from mole_diffusers.studio.prompt_weights import call_arguments, tiled_prompt
from mole_diffusers.studio.recipe import BOUND, TILES, Recipe
from mole_diffusers.studio.samplers import sampler
from mole_diffusers.studio.strength_schedule import StrengthSchedule
from mole_diffusers.studio.weight_syntax import plain_text

USABLE = (
    StrengthSchedule, call_arguments, clip_skip, concept_files, denoiser, drawable, drawing_over, fitted, gate_folders,
    on_white, open_base, parse, read_mask, region_picture, sampler, size_arguments, steps_drawn, tiled_prompt,
)  # fmt: skip
MODULES = {"Image": "PIL"} | {each.__name__: each.__module__ for each in USABLE}  # name that a script may use -> its module


def as_code(recipe: Recipe) -> str:
    """A script for a completed recipe.

    It reads LoRA files and trained gates from the current folder, by their names in the catalog. Those of the embedded
    world, which its hashes tell from others of the same name, come with the package. A picture to draw over is read from
    "image.png", its mask from "mask.png".
    """
    size = f"{recipe.width}, {recipe.height}"
    # Others than the embedded world are put on the device, and in the precision, that the app draws with by default.
    lines = ["pipe = mole.emoji_world().pipe" if recipe.base == WORLD else f"pipe = open_base({recipe.base!r}).pipe"]
    if recipe.sampler:
        lines.append(f"pipe.scheduler = sampler({recipe.sampler!r}, pipe.scheduler, {recipe.seed})")
    lines.append("")
    if recipe.image:
        over = ["image=start", *(["mask_image=mask"] if recipe.mask else [])]
        lines.append(f'start = fitted(on_white(Image.open("image.png")), {size})')
        lines += [f'mask = fitted(region_picture(Image.open("mask.png")), {size})'] if recipe.mask else []
        lines += _drawing_over(recipe, size, over, recipe.strength, masked=bool(recipe.mask))
        lines += ["image = Image.composite(image, start, mask)"] if recipe.mask else []
    else:
        call = [f"width={recipe.width}", f"height={recipe.height}"]
        lines += _pass(recipe, "pipe", call, str(recipe.steps))
    if recipe.hires > 1:
        larger = f"drawable(pipe, round({recipe.width} * {recipe.hires!r}), round({recipe.height} * {recipe.hires!r}))"
        over = ["image=fitted(image, *larger)"]
        lines += ["", f"larger = {larger}", *_drawing_over(recipe, "*larger", over, recipe.hires_strength, masked=False)]
    lines += ['image.save("picture.png")', ""]
    return "\n".join(["import torch", "import mole_diffusers as mole", *_imports("\n".join(lines)), "", *lines])


def _imports(code: str) -> list[str]:
    """Lines that import the names in `MODULES` that the code uses."""
    used = MODULES.keys() & {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    by_module = groupby(sorted((MODULES[name], name) for name in used), key=itemgetter(0))
    return [f"from {module} import {', '.join(name for _, name in found)}" for module, found in by_module]


def _drawing_over(recipe: Recipe, size: str, call: list[str], strength: float, *, masked: bool) -> list[str]:
    """Lines that draw over a picture, which the arguments in `call` name."""
    steps = f"steps_drawn(over, {recipe.steps}, {strength!r})"
    call = [*call, f"strength={strength!r}", f"**size_arguments(over, {size})"]
    return [f"over = drawing_over(pipe, masked={masked})", *_pass(recipe, "over", call, steps)]


def _pass(recipe: Recipe, pipe: str, call: list[str], steps: str) -> list[str]:
    """Lines that attach the LoRAs to a pipeline and call it. `steps`: code for the number of steps that it draws."""
    kind, about = recipe.arm_and_name
    lines, within, callback = list[str](), list[str](), ""
    if recipe.clip_skip > 1:
        within.append(f"clip_skip({pipe}, {recipe.clip_skip})")
    if recipe.experts and kind == "merge":
        files = ", ".join(f"{name!r}: ({_lora(recipe, name)}, {w!r})" for name, w in recipe.constant_strengths().items())
        lines.append(f"merged = mole.merge({{{files}}}, {about!r})")
        lines.append(f'mole.attach({pipe}, {{"merged": merged}}, gates="sum", binding=None)')
    elif recipe.experts and kind != "base":
        lines += _mixture(recipe, [about] if kind == "alone" else list(recipe.experts), pipe, steps)
        within.append(f"mixture.planned(schedule){_tiling(recipe, pipe)}")
        callback = "callback_on_step_end=schedule.on_step()"
    prompt, *others = recipe.call.items()
    texts = [f"{name}={value!r}" for name, value in (prompt, *(each for each in others if each[1] not in ("", True)))]
    arguments = [
        f"**call_arguments({', '.join([pipe, *texts])})",
        *call,
        f"num_inference_steps={recipe.steps}",
        f"guidance_scale={recipe.guidance!r}",
        f'generator=torch.Generator("cpu").manual_seed({recipe.seed})',
        callback,
    ]
    block, indent = ([f"with {', '.join(within)}:"], "    ") if within else ([], "")
    return [*lines, *block, f"{indent}image = {pipe}({', '.join(filter(None, arguments))}).images[0]"]


def _lora(recipe: Recipe, name: str) -> str:
    """A LoRA's file, as code."""
    embedded = concept_files().get(name) if recipe.base == WORLD else None
    is_embedded = embedded is not None and file_hash(embedded) == recipe.experts[name]
    return f"concept_files()[{name!r}]" if is_embedded else repr(f"{name}.safetensors")


def _mixture(recipe: Recipe, names: list[str], pipe: str, steps: str) -> list[str]:
    """Lines that attach these LoRAs and make the schedule of their tags."""
    files = ", ".join(f"{name!r}: {_lora(recipe, name)}" for name in names)
    tags = " ".join(str(tag) for tag in recipe.tags if tag.name in names)
    gates = repr(recipe.gates if recipe.arm == "gates" else "sum")
    embedded = gate_folders().get(recipe.gates) if recipe.base == WORLD and recipe.arm == "gates" else None
    if embedded is not None and gates_hash(embedded) == recipe.gates_sha256:
        gates = f"gate_folders()[{gates}]"
    locks = {place: dict(row) for place, row in recipe.locks.items()}
    given = f", locks={locks}" if locks else ""
    binding = "None" if recipe.binding_of_pass() == "none" else _binding(recipe, names)
    return [
        f"mixture = mole.attach({pipe}, {{{files}}}, gates={gates}, binding={binding})",
        f"tags = parse({tags!r}, mixture.experts).tags",
        f"schedule = StrengthSchedule(list(mixture.experts), tags, unet=denoiser({pipe}), steps={steps}{given})",
    ]


def _tiling(recipe: Recipe, pipe: str) -> str:
    """Code of the `with` item that says whether pictures are drawn in tiles; "" if the mixture decides."""
    bound = recipe.binding_of_pass(over=pipe == "over")
    if bound in ("none", BOUND):
        return ", mixture.tiled(0)" if bound == BOUND else ""
    always = bound == TILES
    prompts = recipe.text, recipe.negative, recipe.prompt_2, recipe.negative_2
    if not recipe.weights or all(plain_text(text) == text for text in prompts):
        return f", mixture.tiled(prompt={recipe.text!r})" if always else ""
    second = f", prompt_2={recipe.prompt_2!r}" if recipe.prompt_2 and not always else ""
    return f", mixture.tiled({'' if always else 'always=False, '}**tiled_prompt({pipe}, {recipe.text!r}{second}))"


def _binding(recipe: Recipe, names: list[str]) -> str:
    """Code of the binding that `attach` takes, with the masks in it."""
    bound = []
    for name, given in recipe.tag_bindings().items():
        painted = isinstance(given, tuple) and isinstance(given[1], Image.Image)
        words = f"({given[0]!r}, read_mask({recipe.masks[name]!r}))" if painted else repr(given)
        bound += [f"{name!r}: {words}"] if name in names else []
    return f"{{{', '.join(bound)}}}" if bound else repr(AUTO)
