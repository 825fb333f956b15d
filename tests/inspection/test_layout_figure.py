"""Regions over a picture."""

import numpy as np
import torch
from PIL import Image, ImageColor

from mole_diffusers.binding import Layout, region_mask
from mole_diffusers.inspection import COLOURS, overlay
from mole_diffusers.inspection.layout_figure import EDGE, TINT


def test_a_region_is_tinted_and_outlined_where_it_is_and_nowhere_else():
    picture = Image.new("RGB", (64, 32), "white")
    image = np.asarray(overlay(picture, Layout({"": region_mask("left", 4, 8)}, {}), side=128)).astype(int)
    assert image.shape == (64, 128, 3)
    assert (image[:, 64:] == 255).all()
    colour = ImageColor.getrgb(COLOURS[0])
    tint = [round(255 + TINT * (c - 255)) for c in colour]
    assert np.abs(image[32, 32] - tint).max() <= 1
    assert (image[32, 64 - EDGE] == colour).all()


def test_a_name_stands_in_every_part_of_its_region():
    """A LoRA of two characters may have a place on either side of another's."""
    sides, middle = (region_mask((left, 0.0, left + 0.25, 1.0), 4, 8) for left in (0.0, 0.375))
    sides = sides + region_mask((0.75, 0.0, 1.0, 1.0), 4, 8)
    pictures = [
        np.asarray(overlay(Image.new("RGB", (64, 32), "grey"), Layout({name: sides, "": middle}, {}), side=256))
        for name in ("mm", "")
    ]
    named = (pictures[0] != pictures[1]).any((0, 2))
    assert named[:64].any()
    assert named[192:].any()
    assert not named[64:192].any()
    empty = overlay(Image.new("RGB", (8, 8), "white"), Layout({"fox": region_mask("left", 4, 8) * 0}, {}), side=64)
    assert (np.asarray(empty) == 255).all()


def test_a_region_is_outlined_on_all_sides_also_at_the_edges_of_the_picture():
    image = np.asarray(overlay(Image.new("RGB", (64, 64), "white"), Layout({"": torch.ones(4, 4)}, {}), side=64))
    line = (image == ImageColor.getrgb(COLOURS[0])).all(-1)
    inner = line[EDGE:-EDGE, EDGE:-EDGE]
    assert not inner.any()
    assert line.sum() == line.size - inner.size
