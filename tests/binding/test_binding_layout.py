"""A layout from maps."""

from itertools import permutations

import pytest
import torch

from mole_diffusers.binding import region_mask
from mole_diffusers.binding.layout import assign, assigned_regions, partition


def bump(height, width, y, x):
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    return torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 4.0)


def test_cells_lie_along_the_longer_side_or_in_quarters_and_share_the_picture():
    wide, tall = partition(2, 4, 8), partition(2, 8, 4)
    assert wide[0, :, :4].eq(1).all()
    assert tall[0, :4].eq(1).all()
    assert len(partition(4, 6, 8)) == len(partition(3, 8, 8)) == 4
    assert len(partition(3, 4, 8)) == len(partition(3, 8, 8, ["y"])) == 3
    for cells in (wide, tall, partition(3, 5, 11), partition(3, 6, 6), partition(3, 6, 6, ["x"])):
        assert torch.equal(cells.sum(0), torch.ones(cells.shape[1:]))


def test_each_subject_gets_the_part_that_its_words_attend_to():
    maps = torch.stack([bump(8, 16, 4, 12), bump(8, 16, 4, 3)])
    regions, margin = assigned_regions(maps, 16, 32)
    assert regions[0, :, 16:].eq(1).all()
    assert regions[1, :, :16].eq(1).all()
    assert margin > 0.5
    swapped, _ = assigned_regions(maps.flip(0), 16, 32)
    assert torch.equal(swapped, regions.flip(0))


def test_a_plan_breaks_the_tie_where_both_attend_to_the_same_place():
    maps = torch.stack([bump(8, 16, 4, 4), bump(8, 16, 4, 5)])
    regions, margin = assigned_regions(maps, 8, 16)
    assert regions[0, :, :8].eq(1).all()
    assert regions[1, :, 8:].eq(1).all()
    assert margin < 0.3


def test_the_assignment_is_the_best_of_all():
    torch.manual_seed(0)
    maps, cells = torch.rand(3, 6, 6), partition(3, 6, 6)
    share = maps / maps.sum((1, 2), keepdim=True)

    def value(order):
        return sum((share[k] * cells[c]).sum().item() for k, c in enumerate(order)) / 3

    found, margin = assign(maps, cells)
    ranked = sorted((value(order) for order in permutations(range(4), 3)), reverse=True)
    assert value(found) == pytest.approx(ranked[0])
    assert margin == pytest.approx(ranked[0] - ranked[1], abs=1e-6)


def test_place_words_win_over_maps_and_choose_the_strips():
    maps = torch.stack([bump(8, 8, 4, 6), bump(8, 8, 4, 1)])
    regions, _ = assigned_regions(maps, 8, 8, [(0, 1, "x")])
    assert regions[0, :, :4].eq(1).all()
    regions, _ = assigned_regions(maps, 8, 8, [(1, 0, "y")])
    assert regions[1, :4].eq(1).all()
    assert regions[0, 4:].eq(1).all()


def test_three_subjects_of_a_square_get_a_quarter_each():
    maps = torch.stack([bump(8, 8, 1, 1), bump(8, 8, 1, 6), bump(8, 8, 6, 6)])
    regions, _ = assigned_regions(maps, 16, 16)
    assert regions[0, :8, :8].eq(1).all()
    assert regions[1, :8, 8:].eq(1).all()
    assert regions[2, 8:, 8:].eq(1).all()


def test_what_is_free_is_shared_and_nobody_gets_nothing():
    maps = torch.stack([bump(8, 8, 1, 1), bump(8, 8, 6, 6)])
    free = 1 - region_mask("left", 16, 16)
    regions, _ = assigned_regions(maps, 16, 16, taken=[1 - free])
    assert torch.equal(regions.sum(0), free)
    assert regions[0, :8, 8:].eq(1).all()  # above one another, since what is free is tall
    regions, _ = assigned_regions(maps[:1], 16, 16, taken=[region_mask("top", 16, 16)])
    assert torch.equal(regions[0], region_mask("bottom", 16, 16))


def test_more_strips_than_the_map_has_columns():
    regions, _ = assigned_regions(torch.rand(5, 4, 4), 32, 64)
    assert regions.sum((1, 2)).min() > 300
