"""Words, regions and masks as text: as they are typed, and as a file keeps them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from mole_diffusers.binding.regions import AUTO, BOXES, EVERYWHERE, Region, region_picture
from mole_diffusers.safe_files import PICTURE_ERRORS, read_picture

PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # file endings of masks
MASK, MOST_PIXELS = "png:", 16 << 20


def parse_binding(text: str, option: str) -> tuple[str, Any]:
    """NAME=WORDS[@REGION] as (name, what `bound` takes). Phrases are separated by |; a box is 0,0,0.5,1.

    A region that ends like a picture's name is a mask in a file. Raises ValueError naming `option`, and FileNotFoundError.
    """
    name, sign, rest = text.partition("=")
    if not sign or not name or not rest:
        raise ValueError(f"{option} {text!r} is not NAME=WORDS[@REGION]")
    if rest == EVERYWHERE:
        return name, EVERYWHERE
    words, at, region = rest.partition("@")
    if not at and words in (AUTO, *BOXES):  # else the region would be a word
        raise ValueError(f"{option} {text!r}: write {name}=@{words} for the region {words}, {name}={words}| for the word")
    if not at:
        return name, parse_phrases(words)
    if region.lower().endswith(PICTURES):
        return name, (parse_phrases(words), read_picture(Path(region), f"{option} {region}", most=MOST_PIXELS))
    return name, (parse_phrases(words), parse_region(region))


def parse_phrases(text: str) -> list[str] | None:
    """Phrases separated by |; None if there are none, which stands for the words of the file."""
    return [word for word in text.split("|") if word.strip()] or None


def parse_region(text: str) -> Region:
    """A region as typed: a name, or four numbers with commas."""
    if text.count(",") == 3:
        try:
            left, top, right, bottom = map(float, text.split(","))
            return left, top, right, bottom
        except ValueError:
            raise ValueError(f"{text!r} is not a box: LEFT,TOP,RIGHT,BOTTOM in shares of the picture") from None
    return text


def mask_text(mask: Image.Image) -> str:
    """A mask picture as text for a file: a PNG in base64."""
    file = io.BytesIO()
    region_picture(mask).save(file, "PNG", optimize=True)
    return MASK + base64.b64encode(file.getvalue()).decode()


def read_mask(text: str) -> Image.Image:
    """The inverse of `mask_text`, in plain grey. Raises ValueError for anything else."""
    if not text.startswith(MASK):
        raise ValueError(f"a mask begins with {MASK!r}")
    try:
        with Image.open(io.BytesIO(base64.b64decode(text.removeprefix(MASK), validate=True)), formats=["PNG"]) as image:
            if image.width * image.height <= MOST_PIXELS:
                return image.convert("L")
    except PICTURE_ERRORS as error:
        raise ValueError("a mask is a PNG in base64") from error
    raise ValueError(f"a mask has at most {MOST_PIXELS} pixels")
