"""Recipes in PNG files, in two forms: A1111's `parameters` text, which other tools read, and our own complete JSON.

Texts of other programs than A1111 and Forge are read by `other_tools`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mole_diffusers.binding.regions import AUTO
from mole_diffusers.lora.safe_files import PICTURE_ERRORS, RefusedFileError, parse_json
from mole_diffusers.studio import other_tools
from mole_diffusers.studio.names import matching, model_name
from mole_diffusers.studio.recipe import DEFAULTS, Recipe, load
from mole_diffusers.studio.samplers import SAMPLERS
from mole_diffusers.studio.weight_syntax import balanced

PARAMETERS, OWN, SHEET = "parameters", "mole_diffusers", "mole_diffusers_grid"  # names of the PNG's text chunks
KNOWN = {OWN, PARAMETERS, "prompt", "workflow", "invokeai_metadata"}  # texts with a recipe, ours and those of other programs
OURS = "mole_diffusers"  # the "Version" in our text of A1111's form
NEGATIVE = "Negative prompt:"
PAIR = re.compile(r'([^:,]*)(?:: ?("(?:\\.|[^\\"])*"|[^,]*))?')  # KEY: VALUE, where only a value in quotes has commas
NOT_NEEDED = ("Model hash", "VAE hash", "RNG", "Version", "Civitai resources", "Civitai metadata")  # in a recipe
SETTING = re.compile(r"[A-Za-z][\w ()/+-]{0,40}")  # a setting's name; rejects what commas inside values leave over
PLAIN = ("Uniform", "Normal", "Simple")  # schedules that mean the sampler's own here
KARRAS_IF_AUTOMATIC = ("DPM++ 2M", "DPM++ SDE", "DPM2", "DPM2 a")  # samplers whose "Automatic" schedule in A1111 is Karras
EXPONENTIAL_IF_AUTOMATIC = ("DPM++ 2M SDE",)  # and Exponential, which is not here
MAX_BYTES, MAX_PIXELS, MAX_TEXT = 64 << 20, 64 << 20, 1 << 20  # of a file, picture, text


def parameters(recipe: Recipe) -> str:
    """The text that A1111, Forge and Civitai read: the prompt with tags, the negative prompt, and a line of settings.

    `Lora hashes` are the first 12 digits of sha256 over the tensors, as A1111 and kohya compute them.
    """
    settings: dict[str, Any] = {
        "Steps": recipe.steps,
        "Sampler": recipe.sampler or "Default",
        "CFG scale": f"{recipe.guidance:g}",
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model": model_name(recipe.base) or "unknown",
        "RNG": "CPU",
    }
    if recipe.image or recipe.hires > 1:
        settings["Denoising strength"] = recipe.hires_strength if recipe.hires > 1 else recipe.strength
    if recipe.hires > 1:
        settings["Hires upscale"] = recipe.hires
    if recipe.clip_skip > 1:
        settings["Clip skip"] = recipe.clip_skip
    if recipe.experts:
        settings["Lora hashes"] = ", ".join(f"{name}: {digest[:12]}" for name, digest in recipe.experts.items())
    settings["Version"] = OURS
    last = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items())
    return "\n".join([recipe.prompt, *([f"{NEGATIVE} {recipe.negative}"] if recipe.negative else []), last])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:"\n') else value


def read_parameters(text: str, where: str = "the text") -> FoundRecipe:
    """A recipe from the text of A1111 or Forge. It is incomplete: hashes are cut to 12 digits, and there are no gates.

    Raises ValueError if the last line has fewer than three settings, lacks steps or seed, or has a value out of range.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"{where} has more text than a recipe: {len(text)} characters, at most {MAX_TEXT}")
    *lines, last = text.strip().split("\n")
    found = _settings(last)
    if len(found) < 3 or not {"Steps", "Seed"} <= set(found):
        raise ValueError(f"{where} has no generation settings: its last line is not 'Steps: .., Sampler: .., Seed: ..'")
    take = found.pop
    at = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    steps, seed, size, guidance = take("Steps"), take("Seed"), take("Size", "0x0"), take("CFG scale", "7")
    pairs = [pair.partition(":") for pair in take("Lora hashes", "").split(",") if ":" in pair]
    is_ours = found.get("Version") == OURS
    sampler, lacking = _sampler(take("Sampler", "Default"), take("Schedule type", ""))
    times = _times_larger(take("Hires resize", ""), size)
    strength, hires = take("Denoising strength", ""), take("Hires upscale", "") or times
    if strength and not hires:
        lacking.append("the picture that it was drawn over")
    if words := [pair.partition(":")[0].strip() for pair in take("TI hashes", "").split(",") if ":" in pair]:
        lacking.append(f"the embeddings {', '.join(words)} (write embedding:NAME for those that you have)")
    if re.search(r"\bAND\b", "\n".join(lines[:at])):
        lacking.append("AND between prompts (a word here)")
    try:
        changed: dict[str, Any] = {"hires_strength" if hires else "strength": float(strength)} if strength else {}
        recipe = Recipe(
            prompt=balanced(_weighed("\n".join(lines[:at]).strip())),
            binding=AUTO if is_ours else "none",  # as there, where every LoRA acts everywhere
            negative=balanced("\n".join(lines[at:]).strip().removeprefix(NEGATIVE).strip()),
            seed=int(seed),
            steps=int(steps),
            guidance=float(take("Distilled CFG Scale", guidance)),
            width=int(size.partition("x")[0]),
            height=int(size.partition("x")[2]),
            sampler=sampler,
            experts={name.strip(): digest.strip() for name, _, digest in pairs},
            hires=float(hires or 1),
            clip_skip=int(take("Clip skip", "1")),
            **changed,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    model = take("Model", "")
    lacking += [f"{key} {value[:40]}" for key, value in found.items() if key not in NOT_NEEDED and SETTING.fullmatch(key)]
    return FoundRecipe(recipe, _left_out(lacking), model, is_theirs=not is_ours)


def _weighed(prompt: str) -> str:
    """The prompt with the strength of every tag written out. A1111 knows no other than 1 for a tag without one."""
    return re.sub(r"<lora:([^:<>]+)>", r"<lora:\1:1>", prompt)


def _times_larger(resized: str, size: str) -> str:
    """The factor that makes a picture of a size as large as the target size, in which one side may be open (0); "" if there
    is no target."""
    target, own = (re.fullmatch(r"(\d{1,5})x(\d{1,5})", text) for text in (resized, size))
    sides = zip(map(int, target.groups()), map(int, own.groups()), strict=True) if target and own else ()
    return next((f"{larger / side:.6g}" for larger, side in sides if larger and side), "")


def _sampler(name: str, schedule: str) -> tuple[str, list[str]]:
    """A recipe's sampler for A1111's sampler and schedule (newer versions write them apart), and what of them is lost."""
    if name == "Default":
        return "", []
    is_karras = schedule == "Karras" or (schedule == "Automatic" and name in KARRAS_IF_AUTOMATIC)
    wanted = [f"{name} Karras", name] if is_karras else [name]
    found = next(filter(None, (matching(each, SAMPLERS) for each in wanted)), "")
    if not found:
        return "", [f"Sampler {name} {schedule}".strip()]
    if schedule == "Automatic" and name in EXPONENTIAL_IF_AUTOMATIC:
        return found, ["Schedule type Exponential"]
    is_same = schedule in ("", "Automatic", *PLAIN) or found.endswith(schedule)
    return found, [] if is_same else [f"Schedule type {schedule}"]


def _settings(line: str) -> dict[str, str]:
    """The keys and values of a line like `Steps: 20, Lora hashes: "a: 1, b: 2"`."""
    found = {}
    for key, value in (pair.groups() for pair in PAIR.finditer(line) if pair[2] is not None):
        found[key.strip()] = value.strip()
        if value.startswith('"'):
            with suppress(json.JSONDecodeError):
                found[key.strip()] = str(json.loads(value))
    return found


def save(image: Image.Image, path: str | Path, recipe: Recipe | None, sheet: Mapping[str, Any] | None = None) -> None:
    """Write a PNG with its recipe inside, in both forms.

    Args:
        sheet: for a sheet of pictures, what it shows, as plain data: its axes as typed, or the labels of its columns.
    """
    texts = {SHEET: json.dumps(sheet)} if sheet else {}
    if recipe is not None:
        texts |= {PARAMETERS: parameters(recipe), OWN: json.dumps(recipe.to_dict())}
    about = PngInfo()
    for name, text in texts.items():
        (about.add_text if text.isascii() else about.add_itxt)(name, text)
    image.save(path, "PNG", pnginfo=about)


@dataclass(frozen=True)
class FoundRecipe:
    """What a picture or a recipe file contains.

    Attributes:
        left_out: one sentence about the settings in another program's text that the recipe lacks; "" if there are none.
        model: the name of the checkpoint in that text; "" if there is none. Our own recipes have their `base`.
        sheet: the argument `sheet` of `save`; {} if the file is not a sheet of pictures.
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
        """What a user should know who draws this with a base model: another checkpoint or defaults, and what is left out."""
        here = model_name(base)
        is_other = self.model and self.model.casefold() != here.casefold()
        other = f"it was drawn with the model {self.model[:80]!r}, and here is {here!r}" if is_other else ""
        recipe = self.recipe
        is_old = recipe.base and recipe.experts and recipe.binding != "none" and recipe.defaults != DEFAULTS
        old = "it was drawn when prompts were read in another way, so its LoRAs may act elsewhere now" if is_old else ""
        is_summed = self.is_theirs and "<lora:" in recipe.prompt
        summed = "its LoRAs act everywhere, as in the program that drew it" if is_summed else ""
        return [note for note in (other, old, summed, self.left_out) if note]


def read(path: str | Path) -> Recipe:
    """The recipe in a file. Raises what `contents` raises."""
    return contents(path).recipe


def contents(path: str | Path) -> FoundRecipe:
    """What a PNG contains: our own recipe if there is one, else that of another program. A file named *.json is a recipe.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a PNG, too large, or has no recipe.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return FoundRecipe(load(path))
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_BYTES >> 20} MiB")
    texts = _texts(path)
    if any(len(text) > MAX_TEXT for text in texts.values()):
        raise ValueError(f"{path.name} has more text than a recipe")
    if OWN in texts:
        recipe = Recipe.from_dict(parse_json(texts[OWN], path.name), path.name)
        return FoundRecipe(recipe, sheet=_sheet(texts.get(SHEET, "{}"), path.name))
    if (theirs := other_tools.read(texts, path.name)) is not None:
        return FoundRecipe(theirs.recipe, _left_out(theirs.lacking), theirs.model, is_theirs=True)
    if PARAMETERS not in texts:
        raise ValueError(f"{path.name} has no recipe: no text of mole, A1111, Forge, ComfyUI, SwarmUI, Fooocus or InvokeAI")
    return read_parameters(texts[PARAMETERS], path.name)


def _left_out(lacking: Sequence[str]) -> str:
    return f"not carried over from the picture's text: {', '.join(lacking)}" if lacking else ""


def _sheet(text: str, where: str) -> dict[str, Any]:
    try:
        sheet = parse_json(text, where)
    except RefusedFileError:  # another program wrote it; the recipe is still good
        return {}
    return sheet if isinstance(sheet, dict) else {}


def _texts(path: Path) -> dict[str, str]:
    """The text chunks of a PNG. Those after the pixels are read only if none before has a recipe: it unpacks the picture."""
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            image: Any = opened
            if image.width * image.height > MAX_PIXELS or getattr(image, "is_animated", False):
                raise Image.DecompressionBombError
            before = {name: text for name, text in image.info.items() if isinstance(text, str)}
            return before if KNOWN & before.keys() else dict(image.text)
    except Image.DecompressionBombError:
        raise ValueError(f"{path.name} is an animation or has more than {MAX_PIXELS >> 20} million pixels") from None
    except PICTURE_ERRORS as error:
        raise ValueError(f"{path.name} is not a PNG that can be read") from error
