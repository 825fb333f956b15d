"""Recipe -> Python code that draws the same picture: it opens the same base, and draws with the same `Studio`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mole_app.studio.base_models import open_base
from mole_app.studio.catalog import Catalog, file_hash, folder_gates, gates_hash
from mole_app.studio.model_folders import files_of
from mole_app.studio.names import WORLD
from mole_app.studio.recipe import PICTURES, Recipe
from mole_app.studio.render import Studio
from mole_world.world import concept_files, gate_folders

USED = (open_base, Catalog, files_of, folder_gates, concept_files, gate_folders, Recipe, Studio)


def as_code(recipe: Recipe, config: str | None = None) -> str:
    """A script for a completed recipe.

    It finds LoRA files by their hash, and embeddings, upscalers, ControlNets and IP-Adapters by their name, in the current
    folder and below, and trained gates in the current folder by their name. Those of the embedded world come with the
    package. Given pictures are read from "image.png", "mask.png", "control.png" and "reference.png". The new one is written
    to "picture.png".

    Args:
        config: the config that the base was opened with, see `open_base`.
    """
    own_loras, own_gates = _not_embedded(recipe)
    loras, gates = ['files_of(".", "lora")'] * own_loras, ['folder_gates(".")'] * own_gates
    if recipe.base == WORLD:
        loras, gates = ["concept_files()", *loras], gates or ["gate_folders()"]
    used = {"embedding": recipe.embeddings, "upscaler": recipe.upscaler, "controlnet": recipe.controlnet}
    used |= dict.fromkeys(("ip_adapter", "clip_vision"), recipe.ip_adapter)
    kinds = ", ".join(f'"{kind}": files_of(".", "{kind}")' for kind, name in used.items() if name)
    words = f", files={{{kinds}}}" if kinds else ""
    opened = repr(recipe.base) + ("" if config is None else f", config={config!r}")
    pictures = [f'{name}=Image.open("{name}.png")' for name in PICTURES if getattr(recipe, name)]
    body = f"""\
base = open_base({opened})
studio = Studio(base.pipe, Catalog({" | ".join(loras) or "{}"}, {" | ".join(gates) or "{}"}{words}), base.name)
recipe = Recipe(
{_arguments(recipe)})
studio.draw({", ".join(["studio.complete(recipe)", *pictures])}).save("picture.png")
"""
    imports = [f"from {each.__module__} import {each.__name__}\n" for each in USED if f"{each.__name__}(" in body]
    return "".join([*imports, "from PIL import Image\n" * bool(pictures), "\n", body])


def _not_embedded(recipe: Recipe) -> tuple[bool, bool]:
    """Whether a recipe has LoRAs, and whether it has trained gates, that do not come with the embedded world."""
    is_world = recipe.base == WORLD
    embedded = {file_hash(file) for file in concept_files().values()} if is_world and recipe.experts else set()
    gates = gate_folders().get(recipe.gates) if is_world else None
    is_embedded = gates is not None and gates_hash(gates) == recipe.gates_sha256
    return not embedded.issuperset(recipe.experts.values()), bool(recipe.gates_sha256) and not is_embedded


def _arguments(recipe: Recipe) -> str:
    """Code of the recipe's fields that have another value than a fresh recipe, a line each. The studio has the rest."""
    fresh: dict[str, Any] = vars(Recipe(""))
    changed = {field.name: getattr(recipe, field.name) for field in fields(Recipe) if field.name != "base"}
    return "".join(f"    {name}={value!r},\n" for name, value in changed.items() if value != fresh[name])
