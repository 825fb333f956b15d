"""Regions that a user gives, as masks."""

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusers.binding import BOXES, checked_region, region_mask


def test_halves_and_boxes_cover_their_places():
    left, right = region_mask("left", 4, 8), region_mask("right", 4, 8)
    assert left[:, :4].eq(1).all()
    assert left[:, 4:].eq(0).all()
    assert torch.equal(left + right, torch.ones(4, 8))
    assert torch.equal(region_mask("top left", 4, 8), left * region_mask("top", 4, 8))
    assert torch.equal(region_mask((0, 0, 1, 1), 3, 5), torch.ones(3, 5))


def test_a_place_that_is_partly_inside_counts_in_part():
    assert region_mask((0, 0, 0.5, 1), 1, 3)[0].tolist() == pytest.approx([1, 0.5, 0], abs=1e-6)
    for box in BOXES.values():
        area = (box[2] - box[0]) * (box[3] - box[1])
        assert region_mask(box, 7, 9).mean().item() == pytest.approx(area, abs=1e-5)


def test_a_mask_picture_is_a_region_whatever_its_size():
    mask = np.zeros((40, 80), np.uint8)
    mask[:, 40:] = 255
    assert torch.equal(region_mask(Image.fromarray(mask), 4, 8), region_mask("right", 4, 8))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_a_mask_whose_white_is_not_known_is_refused(kind):
    with pytest.raises(ValueError, match="region of 'fox' is a picture of mode '[FI]'; make it one of mode 'L'"):
        checked_region(Image.fromarray(np.ones((4, 4), kind)), "fox")
    assert region_mask(checked_region(Image.fromarray(np.full((4, 4), 65535, np.uint16)), "fox"), 2, 2).mean() == 1


@pytest.mark.parametrize(
    "bad", ["middle", (0, 0, 0, 1), (0, 0, 1, 1.5), (0, 0, 1), (0, 0, float("nan"), 1), 3, (True, "a", 1, 1)]
)
def test_another_region_is_refused_with_those_that_there_are(bad):
    with pytest.raises(ValueError, match="region of 'fox'.*'left'"):
        checked_region(bad, "fox")
