"""Styles: words that are put around a prompt, kept in a file that A1111 and Forge read as well.

Presets need no files of their own: the settings of any recipe or picture can be used with another prompt, see `preset`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mole_app.studio.infotext import contents
from mole_app.studio.names import known_names, matching
from mole_app.studio.recipe import Recipe
from mole_diffusers.safe_files import read_json
from mole_diffusers.whole_files import write_text

COLUMNS = ("name", "prompt", "negative_prompt")
PLACE = "{prompt}"  # where a style puts the prompt; without it the style's words come after the prompt
MOST_BYTES = 1 << 20
SETTINGS = (
    "negative", "negative_2", "steps", "guidance", "width", "height", "sampler", "binding", "hires", "hires_strength",
    "detail", "clip_skip",
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """Words for the prompt and for the negative prompt, each with `PLACE` or to be added at the end."""

    name: str
    prompt: str = ""
    negative: str = ""


def read_styles(path: str | Path) -> dict[str, Style]:
    """The styles in a file, by name: A1111's styles.csv, or Fooocus's .json.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is too large, or is no file of styles.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        rows = read_json(path, limit=MOST_BYTES)
    else:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ValueError(f"{path.name} is too large: styles of at most {MOST_BYTES >> 20} MiB are read")
        try:
            rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline="")))
        except (UnicodeError, csv.Error) as error:
            raise ValueError(f"{path.name} is no file of styles: {error}") from error
    found = [_style(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    styles = {style.name: style for style in found if style.name}
    if not styles:
        columns = ", ".join(COLUMNS)
        raise ValueError(f"{path.name} is no file of styles: a .csv with the columns {columns}, or a .json like that")
    return styles


def _style(row: Mapping[str, Any]) -> Style:
    name, prompt, negative = (value if isinstance(value := row.get(column), str) else "" for column in COLUMNS)
    return Style(name.strip(), prompt.strip(), negative.strip())


def save_styles(path: str | Path, styles: Iterable[Style]) -> None:
    """Write styles as A1111's styles.csv."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows((style.name, style.prompt, style.negative) for style in styles)
    write_text(path, text.getvalue())


def styled(recipe: Recipe, names: Iterable[str], known: Mapping[str, Style]) -> Recipe:
    """The recipe with styles around its prompts, one after the other. Raises ValueError for an unknown name."""
    for name in names:
        if (found := matching(name, known)) is None:
            raise ValueError(f"there is no style {name!r}; {known_names(name, known)}")
        style = known[found]
        prompt, negative = _around(style.prompt, recipe.prompt), _around(style.negative, recipe.negative)
        recipe = replace(recipe, prompt=prompt, negative=negative)
    return recipe


def _around(words: str, text: str) -> str:
    return words.replace(PLACE, text).strip(" ,") if PLACE in words else ", ".join(filter(None, (text, words)))


def preset(path: str | Path) -> dict[str, Any]:
    """The settings of a recipe or a picture that go with any prompt, as fields of a Recipe. Raises like `contents`."""
    recipe = contents(path).recipe
    return {name: getattr(recipe, name) for name in SETTINGS}
