"""One prompt and the same seeds, side by side: base, each expert alone, plain sum, gated; and the sheet that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mole_diffusers.mixture import Mixture
from mole_diffusers.patching.gating.settings import PlainSum

MARGIN = 6  # pixels around a cell of a sheet


def ways(names: Iterable[str], *, binds: bool = True, tiles: bool = False, trained: str = "") -> list[str]:
    """The labels of all ways of drawing that are compared: without experts, with each alone, with their plain sum, with each
    on its own words and in its own place, the same in tiles, and with trained gates if those have this label."""
    bound = ["bound", *(["tiles"] if tiles else [])] if binds else []
    return ["base", *(f"alone {name}" for name in names), "sum", *bound, *filter(None, [trained])]


def columns(mixture: Mixture, tiles: Mapping[str, Any] | None = None) -> dict[str, Callable[[], AbstractContextManager]]:
    """The `ways` to draw on one attached mixture: label -> context in which to call the pipeline. "bound" and the gated
    columns are drawn without tiles.

    Args:
        tiles: the prompt, in the form that `Mixture.tiled` takes, to add the column "tiles".
    """
    strengths = {name: mixture.strength(name) for name in mixture.experts}
    alone = {f"alone {n}": partial(mixture.fixed, {n: s}) for n, s in strengths.items()}
    gate_type, binds, untiled = mixture.config.gate_type, mixture.binding is not None, partial(mixture.tiled, 0)
    summed = partial(mixture.parts.planned, PlainSum(len(mixture.experts)))
    gated = (f"bound + {gate_type}" if binds else f"gated ({gate_type})") if not binds or mixture.parameters() else ""
    found: dict[str, Callable[[], AbstractContextManager]] = {
        "base": partial(mixture.fixed, {}),
        **alone,
        "sum": partial(mixture.fixed, strengths),
        "bound": partial(_both, untiled, summed),
        "tiles": partial(_both, partial(mixture.tiled, **(tiles or {})), summed),
        gated: partial(_both, untiled, partial(mixture.only, *strengths)),
    }
    return {label: found[label] for label in ways(strengths, binds=binds, tiles=tiles is not None, trained=gated)}


@contextmanager
def _both(first: Callable[[], AbstractContextManager], second: Callable[[], AbstractContextManager]) -> Iterator[None]:
    with first(), second():
        yield


def sample(pipe: Any, prompt: str, seeds: Sequence[int], **options: Any) -> list[Image.Image]:
    """One picture per seed, each from its own generator, so that the batch does not change a picture's noise."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return pipe([prompt] * len(seeds), generator=generators, **options).images


def compare(
    pipe: Any, mixture: Mixture, prompt: str, *, seeds: Sequence[int], **options: Any
) -> dict[str, list[Image.Image]]:
    """Label -> one picture per seed, for every column of `columns`.

    Args:
        options: further arguments of the pipeline's calls. With `width` and `height`, there is the column "tiles" if the
            mixture by itself would draw in tiles at this size.
    """
    call, pictures = {"prompt": prompt, **options}, {}
    in_tiles = {"width", "height"} <= options.keys() and mixture.parts.draws_in_tiles(call)
    for label, context in columns(mixture, {"prompt": prompt} if in_tiles else None).items():
        with context():
            pictures[label] = sample(pipe, prompt, seeds, **options)
    return pictures


def image_grid(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], labels: Sequence[str], *, cell: int = 128
) -> Image.Image:
    """Arrange pictures in a sheet, with a label above each column and before each row.

    Row labels may have several lines.

    Args:
        rows: one sequence of pictures per row, as many as `columns`.
        cell: shorter side of a cell in pixels. Every picture fits into the cell's shape; small ones are enlarged without
            smoothing.

    Raises ValueError if the pictures do not fill the sheet.
    """
    if any(len(row) != len(columns) for row in rows) or len(rows) != len(labels):
        raise ValueError(f"{[len(r) for r in rows]} pictures do not fill {len(labels)} rows of {len(columns)} columns")
    font = ImageFont.load_default(14)
    left = max((int(font.getlength(line)) for text in labels for line in text.splitlines()), default=0) + 2 * MARGIN
    top = 14 + 3 * MARGIN
    largest = [max((image.size[i] for row in rows for image in row), default=1) for i in (0, 1)]
    wide, high = (round(cell * side / min(largest)) for side in largest)
    sheet = Image.new("RGB", (left + len(columns) * (wide + MARGIN), top + len(rows) * (high + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, text in enumerate(columns):
        draw.text((left + c * (wide + MARGIN) + wide // 2, MARGIN), _fitted(text, wide, font), "black", font, anchor="ma")
    for r, row in enumerate(rows):
        y = top + r * (high + MARGIN)
        draw.text((MARGIN, y + high // 2), labels[r], "black", font, anchor="lm")
        for c, image in enumerate(row):
            fitted = ImageOps.contain(image, (wide, high), Image.Resampling.LANCZOS)
            x = left + c * (wide + MARGIN) + (wide - fitted.width) // 2
            sheet.paste(fitted, (x, y + (high - fitted.height) // 2))
    return sheet


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text
