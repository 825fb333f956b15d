"""A second look at each subject: its part of a finished picture is enlarged, drawn over a little, and put back.

A face that is small in a picture has few latents; enlarged it has as many as the base model draws a whole picture with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter

from mole_diffusers.binding import EVERY_PLACE, OWN_PLACE, Explanation

MARGIN = 0.15  # of a subject's box, on each side
LARGEST = 0.8  # share of the picture from which on a subject is large already
SOFT = 16  # the edge of what is put back is as soft as this part of its box


@dataclass(frozen=True)
class PlacedSubject:
    """A subject with a place of its own.

    Attributes:
        name: the LoRA that draws it.
        acting: all that act on it: its own, what it wears or holds, and those of the whole picture.
        box: (left, top, right, bottom) in pixels: its place with a margin.
        mask: its place in the whole picture, grey.
    """

    name: str
    acting: tuple[str, ...]
    box: tuple[int, int, int, int]
    mask: Image.Image


def with_a_place(explanation: Explanation) -> list[str]:
    """The LoRAs whose subjects may have a detail pass."""
    return [name for name, role in explanation.experts.items() if role.place == OWN_PLACE]


def subjects(explanation: Explanation, regions: Mapping[str, torch.Tensor], size: tuple[int, int]) -> list[PlacedSubject]:
    """The subjects that a picture of this size has room to improve.

    Args:
        regions: LoRA -> its place, [H, W] in 0..1.
    """
    everywhere = [name for name, role in explanation.experts.items() if role.place == EVERY_PLACE]
    found = []
    for name in with_a_place(explanation):
        if name not in regions:  # its place was not decided
            continue
        mask = Image.fromarray((regions[name].float().clamp(0, 1) * 255).byte().cpu().numpy()).resize(size)
        if (box := mask.point([0] * 128 + [255] * 128).getbbox()) is None:
            continue
        across, down = (round(MARGIN * side) for side in (box[2] - box[0], box[3] - box[1]))
        box = max(box[0] - across, 0), max(box[1] - down, 0), min(box[2] + across, size[0]), min(box[3] + down, size[1])
        if (box[2] - box[0]) * (box[3] - box[1]) < LARGEST * size[0] * size[1]:
            worn = [other for other, role in explanation.experts.items() if role.place == f"with {name}"]
            found.append(PlacedSubject(name, (name, *worn, *everywhere), box, mask))
    return found


def enlarged(box: tuple[int, int, int, int], usual: tuple[int, int]) -> tuple[int, int]:
    """The size at which a part of a picture is drawn over: its own proportions, with as many pixels as the base's usual."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = max((usual[0] * usual[1] / (width * height)) ** 0.5, 1.0)
    return round(width * scale), round(height * scale)


def put_back(picture: Image.Image, drawn: Image.Image, subject: PlacedSubject) -> Image.Image:
    """The picture with a subject's part drawn anew, in its place, with a soft edge."""
    left, top, right, bottom = subject.box
    part = drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    radius = max(min(part.size) // SOFT, 1)
    place = Image.new("L", part.size)
    place.paste(255, (radius, radius, part.width - radius, part.height - radius))  # nothing changes at the edge of the box
    place = Image.composite(place, Image.new("L", part.size), subject.mask.crop(subject.box))
    found = picture.copy()
    found.paste(part, (left, top), place.filter(ImageFilter.GaussianBlur(radius / 2)))
    return found
