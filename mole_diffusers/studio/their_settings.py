"""Settings of other programs as a recipe of ours: samplers by their names there, LoRAs that act everywhere.

Their texts are not trusted: anything may be missing or of another type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mole_diffusers.studio.names import matching
from mole_diffusers.studio.prompt_syntax import LoraTag, constant
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.samplers import SAMPLERS
from mole_diffusers.studio.weight_syntax import balanced

OF_SAMPLER = {  # the names of ComfyUI, and of programs that use its names or diffusers' -> ours
    "euler": "Euler", "euler_ancestral": "Euler a", "euler_a": "Euler a", "heun": "Heun", "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a", "kdpm_2": "DPM2", "kdpm_2_a": "DPM2 a", "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_sde": "DPM++ SDE", "dpmpp_2s": "DPM++ 2S", "ddim": "DDIM", "ddpm": "DDPM",
    "lcm": "LCM", "uni_pc": "UniPC", "unipc": "UniPC", "pndm": "PLMS",
}  # fmt: skip
OWN_SCHEDULES = ("", "normal", "simple")  # which mean the sampler's own here


class TheirRecipe(NamedTuple):
    """What a text says: a recipe, what is not in it, and the name of the checkpoint or ""."""

    recipe: Recipe
    lacking: list[str]
    model: str


class Lora(NamedTuple):
    name: str
    unet: float
    te: float


def recipe_of(
    where: str, prompt: str, negative: str, loras: Sequence[Lora], sampler: str, **settings: float | int | str | None
) -> tuple[Recipe, list[str]]:
    """The recipe of a program that adds LoRAs everywhere, and the tags that it cannot have. None is a setting not there."""
    lacking, tags = [], dict[str, LoraTag]()
    for lora in loras:
        name = re.split(r"[\\/]", lora.name.strip())[-1].removesuffix(".safetensors")
        if not name or name in tags or re.search("[<>:]", name):
            lacking.append(f"LoRA {lora.name}")
        else:
            tags[name] = LoraTag(name, te=constant(lora.te), unet=constant(lora.unet))
    given = {name: value for name, value in settings.items() if value is not None}
    words = " ".join([balanced(prompt.strip()), *map(str, tags.values())]).strip()
    try:
        return Recipe(words, balanced(negative.strip()), sampler=sampler, binding="none", **given), lacking  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def sampler_of(name: Any, schedule: Any) -> tuple[str, list[str]]:
    """Our sampler for the name and the schedule of another program, and what of them is lost."""
    name, schedule = as_text(name).lower(), as_text(schedule).lower()
    if not name or name == "default":
        return "", []
    is_karras = schedule == "karras" or name.endswith("_k")
    plain = re.sub(r"(_gpu|_k)$", "", name)
    ours = OF_SAMPLER.get(plain, plain)
    found = next(filter(None, (matching(each, SAMPLERS) for each in ([f"{ours} Karras"] if is_karras else []) + [ours])), "")
    if not found:
        return "", [f"sampler {name}"]
    is_same = (schedule in OWN_SCHEDULES and not is_karras) or (is_karras and found.endswith("Karras"))
    return found, [] if is_same else [f"schedule {schedule or 'karras'}"]


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def as_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_whole(value: Any) -> int | None:
    """A whole number of any size, such as a seed, which a float would round."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d{1,20}", value.strip()):
        return int(value)
    number = as_number(value)
    return None if number is None else int(number)


def seed_of(value: Any) -> int:
    seed = as_whole(value)
    return 0 if seed is None else seed % 2**63  # ComfyUI's may be larger, and PyTorch takes them like this


def stem(name: str) -> str:
    return re.split(r"[\\/]", name)[-1].removesuffix(".safetensors")
