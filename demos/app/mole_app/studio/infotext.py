"""Recipes in PNG files, in two forms: A1111's `parameters` text, which other tools read, and our own complete JSON.

Texts of other programs than A1111 and Forge are read by `other_tools`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mole_app.studio import other_tools
from mole_app.studio.found_recipe import DRAWN_OVER, FoundRecipe, as_whole, found_recipe
from mole_app.studio.names import model_name
from mole_app.studio.recipe import Recipe, load
from mole_diffusers.safe_files import PICTURE_ERRORS, RefusedFileError, parse_json

PARAMETERS, OWN, SHEET = "parameters", "mole_diffusers", "mole_diffusers_grid"  # names of the PNG's text chunks
KNOWN = {OWN, PARAMETERS, "prompt", "workflow", "invokeai_metadata"}  # texts with a recipe, ours and those of other programs
OURS = "mole_diffusers"  # the "Version" in our text of A1111's form
NEGATIVE = "Negative prompt:"
PAIR = re.compile(r'([^:,]*)(?:: ?("(?:\\.|[^\\"])*"|[^,]*))?')  # KEY: VALUE, where only a value in quotes has commas
SETTING = re.compile(r"[A-Za-z][\w ()/+-]{0,40}")  # a setting's name; rejects what commas inside values leave over
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
    at = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    prompt, (width, _, height) = "\n".join(lines[:at]), found.pop("Size", "0x0").partition("x")
    found.setdefault("CFG scale", "7")
    strength, resized = found.pop("Denoising strength", ""), _times_larger(found.get("Hires resize", ""), (width, height))
    hires, lacking = found.setdefault("Hires upscale", resized), list[str]()
    if strength and not hires:
        lacking.append(DRAWN_OVER)
    if words := [name for name, _ in _hashes(found.pop("TI hashes", ""))]:
        lacking.append(f"the embeddings {', '.join(words)} (write embedding:NAME for those that you have)")
    if re.search(r"\bAND\b", prompt):
        lacking.append("AND between prompts (a word here)")
    experts, is_theirs = dict(_hashes(found.pop("Lora hashes", ""))), found.get("Version") != OURS
    said = {
        **{key: value for key, value in found.items() if SETTING.fullmatch(key)},
        "prompt": re.sub(r"<lora:([^:<>]+)>", r"<lora:\1:1>", prompt),  # without a strength, A1111 takes no other than 1
        "negative": "\n".join(lines[at:]).strip().removeprefix(NEGATIVE),
        "width": width,
        "height": height,
        "hires_strength" if hires else "strength": strength,
    }
    return found_recipe(where, said, (), lacking, is_theirs=is_theirs, experts=experts)


def _hashes(text: str) -> list[tuple[str, str]]:
    """The names and hashes of a setting like "fox: 0123456789ab, ink: ba9876543210"."""
    pairs = [pair.partition(":") for pair in text.split(",")]
    return [(name.strip(), digest.strip()) for name, colon, digest in pairs if colon]


def _times_larger(resized: str, own: tuple[str, str]) -> str:
    """The factor to a target size, "1024x0", in which one side may be open; "" if there is none."""
    sides = zip(map(as_whole, resized.split("x")), map(as_whole, own), strict=False)
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
        return theirs
    if PARAMETERS not in texts:
        raise ValueError(f"{path.name} has no recipe: no text of mole, A1111, Forge, ComfyUI, SwarmUI, Fooocus or InvokeAI")
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
            return before if KNOWN & before.keys() else dict(image.text)
    except Image.DecompressionBombError:
        raise ValueError(f"{path.name} is an animation or has more than {MAX_PIXELS >> 20} million pixels") from None
    except PICTURE_ERRORS as error:
        raise ValueError(f"{path.name} is not a PNG that can be read") from error
