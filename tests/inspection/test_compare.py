"""Sheets of pictures."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import mole_diffusers as mole
from mole_diffusers.inspection import compare, image_grid, sample
from mole_diffusers.lora import read_expert


def test_a_comparison_shows_what_a_call_gives_by_default(pipe, loras):
    """The column "tiles" was missing, though a call was drawn in tiles."""
    mixture = mole.attach(
        pipe, {n: replace(read_expert(loras[n], n), triggers=(word,)) for n, word in (("fox", "fox"), ("hat", "hen"))}
    )
    call = {"num_inference_steps": 2, "width": 64, "height": 32}
    found = compare(pipe, mixture, "a fox and a hen", seeds=[1], **call)
    assert list(found) == ["base", "alone fox", "alone hat", "sum", "bound", "tiles"]
    assert found["tiles"] == sample(pipe, "a fox and a hen", [1], **call)
    assert found["tiles"] != found["bound"]
    assert "tiles" not in compare(pipe, mixture, "a fox and a hen", seeds=[1], **call | {"width": 32})
    mixture.strength("hat", 0)
    assert "tiles" not in compare(pipe, mixture, "a fox and a hen", seeds=[1], **call)


def test_a_label_of_several_lines_is_as_wide_as_its_longest():
    rows = [[Image.new("RGB", (8, 8), "red")]]
    several = np.asarray(image_grid(rows, ["a"], ["a fox +\nan octopus"], cell=64))
    single = np.asarray(image_grid(rows, ["a"], ["an octopus"], cell=64))
    assert several.shape == single.shape
    assert np.array_equal(several[:, -70:], single[:, -70:])  # the picture is where it was
    lines = [(sheet[32:, :-70] < 128).all(2).any(1).sum() for sheet in (several, single)]  # rows of pixels with letters
    assert lines[0] > 1.6 * lines[1] > 0


def test_pictures_that_do_not_fill_the_sheet_are_refused():
    with pytest.raises(ValueError, match=r"\[1\] pictures do not fill 1 rows of 2 columns"):
        image_grid([[Image.new("RGB", (8, 8))]], ["a", "b"], ["c"])
