"""XY grids: one recipe, changed along two axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from mole_app.studio.recipe import Recipe, with_strength
from mole_diffusers.inspection import image_grid

AXES = {"seed": int, "steps": int, "guidance": float, "arm": str, "gates": str, "binding": str, "sampler": str,
         "weight": float, "strength": float, "hires": float, "hires_strength": float, "clip_skip": int, "detail": float,
         "control_strength": float, "control_end": float, "ip_scale": float}  # fmt: skip
NEEDS = {"strength": ("image", "a picture that is drawn over"), "control_strength": ("controlnet", "a ControlNet"),
         "control_end": ("controlnet", "a ControlNet"), "ip_scale": ("ip_adapter", "an IP-Adapter")}  # fmt: skip
MAX_CELLS, MOST_PIXELS = 400, 12 << 20  # limits of a grid, and of its sheet


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: what varies along it."""

    varies: str  # "seed", "weight fox", ...
    labels: Sequence[str]
    changes: Sequence[Callable[[Recipe], Recipe]]  # one per label


def parse_axis(text: str) -> Axis:
    """Parse an axis such as `seed=1,2,3`, `weight fox=0,0.5,1` or `arm=base,sum,gates`.

    The other kinds are those of `AXES`. Raises ValueError that names the kinds, and for random seeds.
    """
    left, equals, right = text.partition("=")
    kind, _, about = left.strip().partition(" ")
    values = [word.strip() for word in right.split(",") if word.strip()]
    if not equals or not values or kind not in AXES or bool(about) != (kind == "weight"):
        known = ", ".join("weight NAME" if k == "weight" else k for k in AXES)
        raise ValueError(f"the axis {text!r} is not KIND=VALUE,VALUE,...; kinds: {known}")
    try:
        parsed = [AXES[kind](word) for word in values]
    except ValueError:
        takes = "whole numbers" if AXES[kind] is int else "numbers"
        raise ValueError(f"the axis {text!r}: {kind} takes {takes}, separated by commas") from None
    if kind == "seed" and min(parsed) < 0:  # a random seed would be another one in each cell
        raise ValueError(f"the axis {text!r}: name the seeds, such as seed=1,2,3")
    about = about.strip()
    labels = values if AXES[kind] is str else [f"{about or kind} {word}" for word in values]
    return Axis(f"{kind} {about}".strip(), labels, [partial(_changed, kind=kind, about=about, value=v) for v in parsed])


def _changed(recipe: Recipe, *, kind: str, about: str, value: Any) -> Recipe:
    if kind == "weight":
        return dataclasses.replace(recipe, prompt=with_strength(recipe.prompt, about, value, recipe.experts))
    value = "" if (kind, value) == ("sampler", "default") else value  # as the app calls the model's own
    changed = {kind: value} | ({"gates_sha256": ""} if kind == "gates" else {})
    return dataclasses.replace(recipe, **changed)


def cells(recipe: Recipe, x: Axis, y: Axis) -> list[Recipe]:
    """The recipes of all cells, row by row.

    Raises ValueError for two axes of the same kind, more than MAX_CELLS cells, and strengths that would change nothing.
    """
    if x.varies.casefold() == y.varies.casefold():
        raise ValueError(f"both axes vary {x.varies!r}, and a cell has only one; vary something else along one of them")
    if len(x.labels) * len(y.labels) > MAX_CELLS:
        raise ValueError(f"a grid of {len(x.labels)} x {len(y.labels)} is too large: at most {MAX_CELLS} cells")
    drawn = [across(down(recipe)) for down in y.changes for across in x.changes]
    for name, (other, what) in NEEDS.items():
        if not getattr(recipe, other) and any(getattr(cell, name) != getattr(recipe, name) for cell in drawn):
            raise ValueError(f"an axis of {name} needs {what}")
    if any(cell.hires_strength != recipe.hires_strength and cell.hires == 1 for cell in drawn):
        raise ValueError("an axis of hires_strength needs pictures that are made larger, hires above 1")
    return drawn


def sheet(pictures: Sequence[Image.Image], columns: Sequence[str], labels: Sequence[str]) -> Image.Image:
    """One picture of all cells, row by row, with a label above each column and next to each row. The cells after the last
    picture are grey.

    Cells are made small enough that `infotext.read` can read the file.
    """
    rows, cell = _rows(pictures, len(columns), len(columns) * len(labels))
    return image_grid(rows, columns, labels, cell=cell)


def labelled(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """One picture of pictures that are compared, in about as many rows as columns, with a label above each; see `sheet`."""
    across = math.ceil(math.sqrt(len(labels)))
    cells, cell = _rows(pictures, across, len(labels))
    above = [labels[i : i + across] for i in range(0, len(labels), across)]
    rows = [image_grid([row], words, [""], cell=cell) for row, words in zip(cells, above, strict=True)]
    whole = Image.new("RGB", (rows[0].width, len(rows) * rows[0].height), "white")
    for i, row in enumerate(rows):
        whole.paste(row, (0, i * row.height))
    return whole


def _rows(pictures: Sequence[Image.Image], across: int, count: int) -> tuple[list[list[Image.Image]], int]:
    """`count` cells in rows of `across`, and the shorter side of a cell for `image_grid`."""
    sizes = [image.size for image in pictures] or [(64, 64)]
    size = max(width for width, _ in sizes), max(height for _, height in sizes)
    cells = [*pictures, *[Image.new("RGB", size, "#dddddd")] * (count - len(pictures))]
    rows = [cells[i : i + across] for i in range(0, count, across)]
    longer = min(max(*size, 128), 512, math.isqrt(MOST_PIXELS * max(size) // min(size) // (len(rows) * across)))
    return rows, max(1, longer * min(size) // max(size))
