"""Windows around places, and what divides two that overlap."""

import pytest
import torch

from mole_diffusers.patching.subjects.windows import around, extent, meeting_of, silhouette, touching


def place(height, width, top, bottom, left, right):
    mask = torch.zeros(height, width)
    mask[top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize(
    ("columns", "box"),
    [((0, 12), (0, 16, 0, 16)), ((12, 24), (0, 16, 8, 24)), ((6, 18), (0, 16, 4, 20))],
)
def test_a_place_a_little_smaller_than_a_trained_picture_is_seen_in_a_window_of_that_size(columns, box):
    window = around(place(16, 24, 0, 16, *columns), 16, 4)
    assert window.box == box
    assert window.has_room(16)


def test_other_places_are_seen_as_they_are_and_a_small_one_has_no_room():
    large, small = around(place(32, 64, 0, 32, 3, 30), 16, 4), around(place(16, 64, 0, 16, 0, 11), 16, 4)
    assert large.box == (0, 32, 0, 32)
    assert large.has_room(16)
    assert small.box == (0, 16, 0, 12)
    assert not small.has_room(16)


@pytest.mark.parametrize("size", [(24, 16), (24, 40), (40, 24)])
@pytest.mark.parametrize("stacked", [True, False])
def test_two_that_touch_have_windows_half_over_one_another_in_the_middle(size, stacked):
    height, width = size
    first, second = touching(height, width, 16, stacked)
    along = slice(0, 2) if stacked else slice(2, 4)
    length = height if stacked else width
    begins = [window.box[along][0] for window in (first, second)]
    if length < 24:
        assert not (first.has_room(16) and second.has_room(16))
        return
    assert begins == [length // 2 - 12, length // 2 - 4]
    assert first.has_room(16)
    assert second.has_room(16)
    assert not (first.mask * second.mask).any()
    both = first.mask + second.mask
    assert extent(both)[along] == (length // 2 - 12, length // 2 + 12)
    assert both.sum() == 24 * 16
    meets = meeting_of(first, second, 16)
    assert extent(meets)[along] == (length // 2 - 3, length // 2 + 3)  # three sixteenths of a window on both sides


def test_windows_that_do_not_overlap_and_places_that_do_have_no_meeting():
    apart = [around(place(16, 32, 0, 16, a, a + 16), 16, 4) for a in (0, 16)]
    assert meeting_of(*apart, 16) is None
    shared = [around(place(16, 24, 0, 16, *c), 16, 4) for c in ((0, 13), (11, 24))]
    assert meeting_of(*shared, 16) is None


def test_a_silhouette_is_where_the_prompt_changes_the_prediction_however_strong_it_is():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    inside = ((rows - 8) ** 2 + (columns - 8) ** 2) < 25
    noise = 0.05 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = silhouette(inside * torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None, None] + noise)
    assert found.shape == (2, 16, 16)
    assert found[:, 6:11, 6:11].min() == 1
    assert found[:, :2].max() == 0
    torch.testing.assert_close(silhouette(1e-3 * (inside + noise)), silhouette(1e3 * (inside + noise)))
