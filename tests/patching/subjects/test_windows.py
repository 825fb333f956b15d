"""Windows around places, and what divides two that overlap."""

import pytest
import torch

from mole_diffusers.patching.subjects.windows import (
    border_of,
    extent,
    silhouette,
    window_around,
    windows_of_two_that_touch,
)


def place(height, width, top, bottom, left, right):
    mask = torch.zeros(height, width)
    mask[top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize(
    ("columns", "box"),
    [((0, 12), (0, 16, 0, 16)), ((12, 24), (0, 16, 8, 24)), ((6, 18), (0, 16, 4, 20))],
)
def test_a_place_a_little_smaller_than_a_trained_picture_is_seen_in_a_window_of_that_size(columns, box):
    window = window_around(place(16, 24, 0, 16, *columns), 16, 4)
    assert window.box == box
    assert window.has_room(16)


def test_other_places_are_seen_as_they_are_and_a_small_one_has_no_room():
    large, small = window_around(place(32, 64, 0, 32, 3, 30), 16, 4), window_around(place(16, 64, 0, 16, 0, 11), 16, 4)
    assert large.box == (0, 32, 0, 32)
    assert large.has_room(16)
    assert small.box == (0, 16, 0, 12)
    assert not small.has_room(16)


@pytest.mark.parametrize(
    ("size", "sides"), [((24, 16), (16, 16)), ((24, 40), (16, 40)), ((32, 16), (20, 16)), ((28, 16), (20, 16))]
)
@pytest.mark.parametrize("stacked", [True, False])
def test_two_that_touch_have_windows_that_share_the_middle_of_the_picture(size, sides, stacked):
    height, width = size if stacked else size[::-1]
    first, second = windows_of_two_that_touch(height, width, 16, 4, stacked)
    for window in (first, second):
        top, bottom, left, right = window.box
        assert (bottom - top, right - left) == (sides if stacked else sides[::-1])
        assert window.has_room(16)
    assert torch.equal(first.mask + second.mask, torch.ones(height, width))
    divided = extent(border_of(first, second, 16))[slice(0, 2) if stacked else slice(2, 4)]
    assert divided == (size[0] // 2 - 3, size[0] // 2 + 3)  # three sixteenths of a window on both sides


def test_two_that_touch_have_no_room_in_less_than_one_and_a_half_windows():
    assert not all(window.has_room(16) for window in windows_of_two_that_touch(20, 16, 16, 4, stacked=True))
    assert not all(window.has_room(16) for window in windows_of_two_that_touch(24, 16, 16, 4, stacked=False))


def test_windows_that_hardly_overlap_and_places_that_do_have_no_border():
    apart = [window_around(place(16, 32, 0, 16, a, a + 16), 16, 4) for a in (0, 16)]
    assert border_of(*apart, 16) is None
    shared = [window_around(place(16, 24, 0, 16, *c), 16, 4) for c in ((0, 13), (11, 24))]
    assert border_of(*shared, 16) is None
    narrow = [window_around(place(16, 28, 0, 16, *c), 16, 4) for c in ((0, 14), (14, 28))]
    assert border_of(*narrow, 16) is None  # four columns are shared, and a border has six


def test_a_silhouette_is_where_the_prompt_changes_the_prediction_however_strong_it_is():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    inside = ((rows - 8) ** 2 + (columns - 8) ** 2) < 25
    noise = 0.05 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = silhouette(inside * torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None, None] + noise)
    assert found.shape == (2, 16, 16)
    assert found[:, 6:11, 6:11].min() == 1
    assert found[:, :2].max() == 0
    torch.testing.assert_close(silhouette(1e-3 * (inside + noise)), silhouette(1e3 * (inside + noise)))
