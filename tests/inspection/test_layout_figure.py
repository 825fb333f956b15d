"""Regions over a picture."""

import numpy as np
from PIL import Image, ImageColor

from mole_diffusers.binding.regions import region_mask
from mole_diffusers.inspection.gate_figures import COLOURS
from mole_diffusers.inspection.layout_figure import EDGE, TINT, overlay
from mole_diffusers.patching.picture_layout import Layout


def test_a_region_is_tinted_and_outlined_where_it_is_and_nowhere_else():
    picture = Image.new("RGB", (64, 32), "white")
    image = np.asarray(overlay(picture, Layout({"": region_mask("left", 4, 8)}, {}), side=128)).astype(int)
    assert image.shape == (64, 128, 3)
    assert (image[:, 64:] == 255).all()
    colour = ImageColor.getrgb(COLOURS[0])
    tint = [round(255 + TINT * (c - 255)) for c in colour]
    assert np.abs(image[32, 32] - tint).max() <= 1
    assert (image[32, 64 - EDGE] == colour).all()
