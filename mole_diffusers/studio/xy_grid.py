"""XY grids: one recipe, changed along two axes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mole_diffusers.inspection.compare import image_grid
from mole_diffusers.studio.infotext import OWN, PARAMETERS, parameters
from mole_diffusers.studio.recipe import Recipe, with_strength

KINDS = {"seed": int, "steps": int, "guidance": float, "arm": str, "gates": str, "sampler": str, "weight": float}
MAX_CELLS = 400
GRID = "mole_diffusers_grid"  # name of the PNG's text chunk that says what a grid shows


@dataclass(frozen=True)
class Axis:
    """What varies along one side of a grid."""

    labels: tuple[str, ...]
    changes: tuple[Callable[[Recipe], Recipe], ...]  # one per label


def parse_axis(text: str) -> Axis:
    """Parse `seed=1,2,3`, `weight fox=0,0.5,1`, `arm=base,sum,gates`; also steps, guidance, gates and sampler.

    Raises ValueError naming the kinds.
    """
    left, equals, right = text.partition("=")
    kind, _, about = left.strip().partition(" ")
    values = [word.strip() for word in right.split(",") if word.strip()]
    if not equals or not values or kind not in KINDS or bool(about) != (kind == "weight"):
        known = ", ".join("weight NAME" if k == "weight" else k for k in KINDS)
        raise ValueError(f"the axis {text!r} is not KIND=VALUE,VALUE,...; kinds: {known}")
    try:
        parsed = [KINDS[kind](word) for word in values]
    except ValueError:
        raise ValueError(f"the axis {text!r}: {kind} takes {KINDS[kind].__name__} values") from None
    label = f"{about or kind} "
    return Axis(
        tuple(word if kind in ("arm", "gates", "sampler") else label + word for word in values),
        tuple(_change(kind, about.strip(), value) for value in parsed),
    )


def _change(kind: str, about: str, value: object) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        if kind != "weight":
            changed: dict = {kind: value} | ({"gates_sha256": ""} if kind == "gates" else {})
            return dataclasses.replace(recipe, **changed)
        prompt = with_strength(recipe.prompt, about, float(value), recipe.experts)  # type: ignore[arg-type]
        return dataclasses.replace(recipe, prompt=prompt)

    return change


def cells(recipe: Recipe, x: Axis, y: Axis) -> list[list[Recipe]]:
    """A recipe per cell, row by row. Raises ValueError for more than MAX_CELLS."""
    if len(x.labels) * len(y.labels) > MAX_CELLS:
        raise ValueError(f"a grid of {len(x.labels)} x {len(y.labels)} is too large: at most {MAX_CELLS} cells")
    return [[across(down(recipe)) for across in x.changes] for down in y.changes]


def sheet(pictures: Sequence[Sequence[Image.Image | None]], x: Axis, y: Axis) -> Image.Image:
    """The labelled grid as one picture; cells that were not drawn are grey."""
    sizes = [image.size for row in pictures for image in row if image] or [(64, 64)]
    size = max(width for width, _ in sizes), max(height for _, height in sizes)
    blank = Image.new("RGB", size, "#dddddd")
    rows = [[image or blank for image in row] for row in pictures]
    longer = min(max(*size, 128), 512)
    return image_grid(rows, list(x.labels), list(y.labels), cell=max(1, longer * min(size) // max(size)))


def save(image: Image.Image, path: str | Path, recipe: Recipe, x: str, y: str) -> None:
    """Write a grid as a PNG that holds the recipe it was made from, as a picture of its own does, and its axes as typed."""
    save_sheet(image, path, {"x": x, "y": y}, recipe)


def save_sheet(image: Image.Image, path: str | Path, about: dict[str, Any], recipe: Recipe | None = None) -> None:
    """Write a sheet of pictures as a PNG with what it shows inside, as JSON."""
    texts = {GRID: json.dumps(about)}
    if recipe is not None:
        texts |= {PARAMETERS: parameters(recipe), OWN: json.dumps(recipe.to_dict())}
    chunks = PngInfo()
    for name, text in texts.items():
        (chunks.add_text if text.isascii() else chunks.add_itxt)(name, text)
    image.save(path, "PNG", pnginfo=chunks)


def axes_in(path: str | Path) -> dict[str, Any]:
    """What the PNG of a grid says of itself. Raises ValueError for any other file."""
    with Image.open(path) as image:
        texts = getattr(image, "text", {})
    if GRID not in texts:
        raise ValueError(f"{Path(path).name} is not a grid: it has no text {GRID!r}")
    return json.loads(texts[GRID])
