"""Recipes in PNG files, in two forms: A1111's `parameters` text, which other tools read, and our own complete JSON.

Pictures of A1111 and Forge are read too, with what their text has and a recipe lacks. That text is not trusted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mole_app.studio.names import matching, model_name
from mole_app.studio.recipe import FIELD_TYPES, Recipe, load
from mole_app.studio.samplers import SAMPLERS
from mole_app.studio.weight_syntax import balanced
from mole_diffusers.binding import AUTO
from mole_diffusers.safe_files import PICTURE_ERRORS, RefusedFileError, parse_json

PARAMETERS, OWN, SHEET = "parameters", "mole_diffusers", "mole_diffusers_grid"  # names of the PNG's text chunks
OURS = "mole_diffusers"  # the "Version" in our text of A1111's form
NEGATIVE = "Negative prompt:"
PAIR = re.compile(r'([^:,]*)(?:: ?("(?:\\.|[^\\"])*"|[^,]*))?')  # KEY: VALUE, where only a value in quotes has commas
SETTING = re.compile(r"[A-Za-z][\w ()/+-]{0,40}")  # a setting's name; rejects what commas inside values leave over
# Settings that a recipe needs nothing of.
QUIET = (
    "Hires resize",
    "Model hash",
    "VAE hash",
    "RNG",
    "Version",
    "Civitai resources",
    "Civitai metadata",
)
AUTOMATIC = dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM2", "DPM2 a"), "Karras")  # sampler -> its "Automatic" in A1111
AUTOMATIC |= {"DPM++ 2M SDE": "Exponential"}
OWN_SCHEDULES = ("", "normal", "simple", "uniform")  # which mean the sampler's own here
MAX_BYTES, MAX_PIXELS, MAX_TEXT = 64 << 20, 64 << 20, 1 << 20  # of a file, picture, text


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
    if recipe.upscaler:
        settings["Hires upscaler"] = recipe.upscaler
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
    *lines, last = text.strip().split("\n")
    found = _settings(last)
    if len(found) < 3 or not {"Steps", "Seed"} <= set(found):
        raise ValueError(f"{where} has no generation settings: its last line is not 'Steps: .., Sampler: .., Seed: ..'")
    is_theirs = found.get("Version") != OURS
    at = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    prompt = re.sub(r"<lora:([^:<>]+)>", r"<lora:\1:1>", "\n".join(lines[:at]))  # A1111 takes 1 if there is no strength
    negative = "\n".join(lines[at:]).strip().removeprefix(NEGATIVE)
    width, _, height = found.pop("Size", "").partition("x")
    hires = found.pop("Hires upscale", "") or _times_larger(found.get("Hires resize", ""), (width, height))
    strength, guidance = found.pop("Denoising strength", ""), found.pop("CFG scale", "7")
    given = {
        "seed": found.pop("Seed"),
        "steps": found.pop("Steps"),
        "guidance": found.pop("Distilled CFG Scale", "") or guidance,
        "width": width,
        "height": height,
        "hires": hires,
        "hires_strength" if hires else "strength": strength,
        "clip_skip": found.pop("Clip skip", ""),
    }
    numbers = {name: _number(value, whole=FIELD_TYPES[name] is int) for name, value in given.items() if value}
    sampler, lost = _sampler(found.pop("Sampler", ""), found.pop("Schedule type", ""))
    lost += [f"{name} {given[name][:40]}" for name, number in numbers.items() if number is None]
    if strength and not hires:
        lost.append("the picture that it was drawn over")
    if words := [name for name, _ in _hashes(found.pop("TI hashes", ""))]:
        lost.append(f"the embeddings {', '.join(words)} (write embedding:NAME for those that you have)")
    if re.search(r"\bAND\b", prompt):
        lost.append("AND between prompts (a word here)")
    model, experts = found.pop("Model", ""), dict(_hashes(found.pop("Lora hashes", "")))
    rest = [key for key, value in found.items() if SETTING.fullmatch(key) and key not in QUIET and value not in ("", "None")]
    lost += [f"{key} {found[key][:40]}" for key in rest[:20]]
    own: dict[str, Any] = {name: number for name, number in numbers.items() if number is not None}
    try:
        recipe = Recipe(
            balanced(prompt.strip()),
            balanced(negative.strip()),
            binding="none" if is_theirs else AUTO,
            sampler=sampler,
            experts=experts,
            **own,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    left_out = f"not carried over from the picture's text: {', '.join(lost)}" if lost else ""
    return FoundRecipe(recipe, left_out, re.split(r"[\\/]", model)[-1].removesuffix(".safetensors"), is_theirs=is_theirs)


def _sampler(name: str, schedule: str) -> tuple[str, list[str]]:
    """Our sampler for A1111's sampler and schedule, and what of them is lost."""
    if name.casefold() in ("", "default"):
        return "", []
    wanted = AUTOMATIC.get(name, "") if schedule == "Automatic" else schedule
    found = next(filter(None, (matching(each.strip(), SAMPLERS) for each in (f"{name} {wanted}", name))), "")
    if not found:
        return "", [f"sampler {name} {schedule}".strip()]
    is_same = wanted.casefold() in OWN_SCHEDULES or found.casefold().endswith(wanted.casefold())
    return found, [] if is_same else [f"schedule {wanted}"]


def _number(text: str, *, whole: bool) -> float | None:
    """The number in a text; None if there is none. Whole ones have any size, such as a seed, which a float would round."""
    if whole and re.fullmatch(r"\d{1,20}", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return None
    return None if not math.isfinite(number) else int(number) if whole else number


def _hashes(text: str) -> list[tuple[str, str]]:
    """The names and hashes of a setting like "fox: 0123456789ab, ink: ba9876543210"."""
    pairs = [pair.partition(":") for pair in text.split(",")]
    return [(name.strip(), digest.strip()) for name, colon, digest in pairs if colon]


def _times_larger(resized: str, own: tuple[str, str]) -> str:
    """The factor to a target size, "1024x0", in which one side may be open; "" if there is none."""
    sizes = zip(resized.split("x"), own, strict=False)
    sides = [(_number(larger, whole=True), _number(side, whole=True)) for larger, side in sizes]
    return next((f"{larger / side:.6g}" for larger, side in sides if larger and side), "")


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


def read(path: str | Path) -> Recipe:
    """The recipe in a file. Raises what `contents` raises."""
    return contents(path).recipe


def contents(path: str | Path) -> FoundRecipe:
    """What a PNG contains: our own recipe if there is one, else that of A1111 or Forge. A file named *.json is a recipe.

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
    if PARAMETERS not in texts:
        raise ValueError(f"{path.name} has no recipe: no text of mole, A1111 or Forge")
    return read_parameters(texts[PARAMETERS], path.name)


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
            return before if {OWN, PARAMETERS} & before.keys() else dict(image.text)
    except Image.DecompressionBombError:
        raise ValueError(f"{path.name} is an animation or has more than {MAX_PIXELS >> 20} million pixels") from None
    except PICTURE_ERRORS as error:
        raise ValueError(f"{path.name} is not a PNG that can be read") from error
