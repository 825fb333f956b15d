"""Recipe -> Python code that draws the same picture."""

from __future__ import annotations

from dataclasses import fields

from mole_diffusers.emoji.world import concept_files, gate_folders
from mole_diffusers.studio.base_models import WORLD
from mole_diffusers.studio.catalog import UNTRAINED
from mole_diffusers.studio.recipe import Recipe


def as_code(recipe: Recipe) -> str:
    """A script for a completed recipe. LoRA files and trained gates have their names here, without folders, but for those of
    the embedded world; so have the pictures that it draws over, "image.png" and "mask.png"."""
    there = {*concept_files(), *gate_folders()} if recipe.base == WORLD else set()
    loras = {name: f"{name}.safetensors" for name in recipe.experts if name not in there}
    gates = {name: name for name in [recipe.gates] if name not in {*UNTRAINED, *there}}
    if recipe.base == WORLD:
        lines = ["from mole_diffusers.emoji.world import concept_files, emoji_world, gate_folders"]
        base, files = "emoji_world().pipe", f"concept_files() | {loras}, gate_folders() | {gates}"
    elif recipe.base.endswith(".safetensors"):
        lines = ["from mole_diffusers.studio.base_models import open_base"]
        base, files = f"open_base({recipe.base!r}).pipe", f"{loras}, {gates}"
    else:
        lines = ["from diffusers import DiffusionPipeline"]
        base, files = f"DiffusionPipeline.from_pretrained({recipe.base!r})", f"{loras}, {gates}"
    pictures = ", ".join(f'{name}=Image.open("{name}.png")' for name in ("image", "mask") if getattr(recipe, name))
    told = {field.name: getattr(recipe, field.name) for field in fields(Recipe) if field.name not in ("image", "mask")}
    lines += [
        "from mole_diffusers.studio.catalog import Catalog",
        "from mole_diffusers.studio.recipe import Recipe",
        "from mole_diffusers.studio.render import Studio, with_pictures",
        *(["from PIL import Image"] if pictures else []),
        "",
        "recipe = Recipe(",
        *(f"    {name}={value!r}," for name, value in told.items() if value != getattr(Recipe(""), name)),
        ")",
        f"over = dict({pictures})",
        f"studio = Studio({base}, Catalog({files}), recipe.base)",
        'studio.draw(with_pictures(recipe, **over), **over).save("picture.png")',
    ]
    return "\n".join([*lines, ""])
