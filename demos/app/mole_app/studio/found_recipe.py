"""What a picture or a file contains: a recipe, and what the settings of another program have that a recipe lacks.

The texts of other programs are not trusted: anything may be missing or of another type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mole_app.studio.names import matching, model_name
from mole_app.studio.prompt_syntax import LoraTag, constant
from mole_app.studio.recipe import FIELD_TYPES, Recipe
from mole_app.studio.samplers import SAMPLERS
from mole_app.studio.weight_syntax import balanced
from mole_diffusers.binding import AUTO

FIELDS = {  # field of a recipe, "schedule" or "model" -> the names of its setting; the first that is there counts
    "prompt": ("full_prompt", "positive_prompt", "prompt"),
    "negative": ("full_negative_prompt", "negative_prompt", "negativeprompt", "negative"),
    "seed": ("Seed", "seed"),
    "steps": ("Steps", "steps"),
    "guidance": (
        "Distilled CFG Scale",
        "CFG scale",
        "fluxguidancescale",
        "cfgscale",
        "guidance",
        "cfg_scale",
        "guidance_scale",
    ),
    "width": ("width",),
    "height": ("height",),
    "sampler": ("Sampler", "sampler", "comfyuisampler"),
    "schedule": ("Schedule type", "scheduler", "comfyuischeduler"),
    "strength": ("strength",),
    "hires": ("Hires upscale",),
    "hires_strength": ("hires_strength",),
    "clip_skip": ("Clip skip", "clip_skip"),
    "model": ("Model", "base_model", "model"),
}  # fmt: skip
QUIET = {  # settings that a recipe needs nothing of, or that are read by themselves
    *(name for names in FIELDS.values() for name in names),
    "Hires resize", "Model hash", "VAE hash", "RNG", "Version", "Civitai resources", "Civitai metadata",  # of A1111
    "loras", "loraweights", "swarm_version", "aspectratio", "images", "automaticvae", "sidelength",  # of SwarmUI
    "base_model_hash", "metadata_scheme", "version", "created_by", "resolution",  # of Fooocus
    "app_version", "generation_mode", "rand_device", "init_image",  # of InvokeAI
}  # fmt: skip
OF_SAMPLER = {  # the names of ComfyUI, and of programs that use its names or diffusers' -> ours
    "euler": "Euler", "euler_ancestral": "Euler a", "euler_a": "Euler a", "heun": "Heun", "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a", "kdpm_2": "DPM2", "kdpm_2_a": "DPM2 a", "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_sde": "DPM++ SDE", "dpmpp_2s": "DPM++ 2S", "ddim": "DDIM", "ddpm": "DDPM",
    "lcm": "LCM", "uni_pc": "UniPC", "unipc": "UniPC", "pndm": "PLMS",
}  # fmt: skip
OWN_SCHEDULES = ("", "normal", "simple", "uniform")  # which mean the sampler's own here
AUTOMATIC = dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM2", "DPM2 a"), "Karras")  # sampler -> its "Automatic" in A1111
AUTOMATIC |= {"DPM++ 2M SDE": "Exponential"}
DRAWN_OVER = "the picture that it was drawn over"


@dataclass(frozen=True)
class FoundRecipe:
    """What a picture or a recipe file contains.

    Attributes:
        left_out: one sentence about the settings in another program's text that the recipe lacks; "" if there are none.
        model: the name of the checkpoint in that text; "" if there is none. Our own recipes have their `base`.
        sheet: the argument `sheet` of `infotext.save`; {} if the file is not a sheet of pictures.
        is_theirs: whether another program wrote it. These add LoRAs everywhere, and so does the recipe.
    """

    recipe: Recipe
    left_out: str = ""
    model: str = ""
    sheet: Mapping[str, Any] = field(default_factory=dict)
    is_theirs: bool = False

    @property
    def axes(self) -> list[str]:
        """The axes of a grid, across and down; [] if this is not a grid."""
        x, y = self.sheet.get("x"), self.sheet.get("y")
        return [x, y] if isinstance(x, str) and isinstance(y, str) else []

    def notes(self, base: str) -> list[str]:
        """What a user should know who draws this with a base model: another checkpoint, and what is left out."""
        here = model_name(base)
        is_other = self.model and self.model.casefold() != here.casefold()
        other = f"it was drawn with the model {self.model[:80]!r}, and here is {here!r}" if is_other else ""
        is_summed = self.is_theirs and "<lora:" in self.recipe.prompt
        summed = "its LoRAs act everywhere, as in the program that drew it" if is_summed else ""
        return [note for note in (other, summed, self.left_out) if note]


class Lora(NamedTuple):
    """A LoRA as another program names it, and its strengths in the denoiser and in the text encoders."""

    name: str
    unet: float
    te: float


def found_recipe(
    where: str,
    said: Mapping[str, Any],
    loras: Iterable[Lora] = (),
    lacking: Sequence[str] = (),
    *,
    is_theirs: bool = True,
    **own: Any,
) -> FoundRecipe:
    """The recipe of another program, which adds LoRAs everywhere unless it is not `is_theirs`.

    Args:
        where: what an error names.
        said: the settings by their names there, see `FIELDS`. The recipe says which of them it lacks.
        lacking: what else it lacks.
        own: fields of the recipe that need not be read.

    Raises ValueError for a value that a recipe does not take.
    """
    given = {f: next((said[n] for n in names if said.get(n) not in (None, "", [])), None) for f, names in FIELDS.items()}
    texts = {name: as_text(given.pop(name)).strip() for name in ("prompt", "negative", "sampler", "schedule", "model")}
    own["sampler"], lost = sampler_of(texts["sampler"], texts["schedule"])
    tags: dict[str, LoraTag] = {}
    for lora in loras:
        if not (name := stem(lora.name)) or name in tags or re.search("[<>:]", name):
            lost.append(f"LoRA {lora.name}")
        else:
            tags[name] = LoraTag(name, te=constant(lora.te), unet=constant(lora.unet))
    for name, value in given.items():
        number = as_whole(value) if FIELD_TYPES[name] is int else as_number(value)
        if number is not None:  # ComfyUI's seeds may be larger than ours, and PyTorch takes them like this
            own[name] = number % 2**63 if name == "seed" and number >= 2**63 else number
        elif value is not None:
            lost.append(f"{name} {str(value)[:40]}")
    prompt = " ".join([balanced(texts["prompt"]), *map(str, tags.values())]).strip()
    try:
        recipe = Recipe(prompt, balanced(texts["negative"]), binding="none" if is_theirs else AUTO, **own)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    off: tuple[Any, ...] = (None, "", False, "None", [], {})
    rest = [(key, value) for key, value in said.items() if key not in QUIET and value not in off]
    shown = [(key[:40], str(value)[:40] if isinstance(value, str | int | float) else "") for key, value in rest[:20]]
    lost += [*lacking, *(" ".join(filter(None, pair)) for pair in shown)]
    left_out = f"not carried over from the picture's text: {', '.join(lost)}" if lost else ""
    return FoundRecipe(recipe, left_out, stem(texts["model"]), is_theirs=is_theirs)


def sampler_of(name: str, schedule: str) -> tuple[str, list[str]]:
    """Our sampler for the name and the schedule of another program, and what of them is lost."""
    if name.casefold() in ("", "default"):
        return "", []
    ours = OF_SAMPLER.get(re.sub(r"(_gpu|_k)$", "", name.lower()), name)
    wanted = "Karras" if name.endswith("_k") else AUTOMATIC.get(ours, "") if schedule == "Automatic" else schedule
    found = next(filter(None, (matching(each.strip(), SAMPLERS) for each in (f"{ours} {wanted}", ours))), "")
    if not found:
        return "", [f"sampler {name} {schedule}".strip()]
    is_same = wanted.casefold() in OWN_SCHEDULES or found.casefold().endswith(wanted.casefold())
    return found, [] if is_same else [f"schedule {wanted}"]


def as_text(value: Any) -> str:
    """A text, or several joined by commas; "" for anything else."""
    if isinstance(value, list):
        return ", ".join(filter(None, (each for each in value if isinstance(each, str))))
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


def stem(name: str) -> str:
    """The name of a file of another program, without its folder."""
    return re.split(r"[\\/]", name.strip())[-1].removesuffix(".safetensors")
