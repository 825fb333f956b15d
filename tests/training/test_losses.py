"""The maths of the losses, by hand."""

import math

import pytest
import torch

from mole_diffusers.binding import region_mask
from mole_diffusers.binding.layout import partition
from mole_diffusers.training import cells
from mole_diffusers.training.losses import (
    caption_loss,
    composed_target,
    mole_clip_loss,
    recovery_error,
    separation_loss,
    side_by_side,
    softened,
    territory,
)


def test_recovery_by_hand():
    teacher = torch.ones(2, 1, 2, 2)
    norm = torch.ones(2)  # the teacher differs from a base of zeros by 1 everywhere
    assert recovery_error(teacher, teacher, norm).item() == 0
    assert recovery_error(torch.zeros_like(teacher), teacher, norm).item() == pytest.approx(1)
    assert recovery_error(0.5 * teacher, teacher, norm).item() == pytest.approx(0.25)


def test_composed_target_by_hand():
    base = torch.zeros(1, 1, 1, 2)
    experts = torch.stack([base + 2, base + 3])
    masks = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).reshape(2, 1, 1, 1, 2)
    blend = composed_target(base, experts, masks, torch.tensor([0.5, 2.0]))
    assert blend.flatten().tolist() == [0.5 * 2 + 2 * 3, 2 * 3]
    one = composed_target(base, experts[:1], torch.ones(1, 1, 1, 1, 2), torch.ones(1))
    assert torch.equal(one, experts[0])


def test_territory_is_shared_out_and_each_keeps_its_own_ground():
    maps = torch.full((2, 1, 2, 2), 0.1)
    maps[0, 0, 0, 0], maps[1, 0, 1, 1] = 0.9, 0.2  # the second is faint, but strongest in its corner
    masks = territory(maps)
    torch.testing.assert_close(masks.sum(0), torch.ones(1, 1, 2, 2))
    assert masks[0, 0, 0, 0, 0] > 0.9
    assert masks[1, 0, 0, 1, 1] > 0.9


def test_separation_by_hand():
    apart = torch.zeros(2, 2, 1, 1, 2)
    apart[0, ..., 0] = apart[1, ..., 1] = 1.0  # two layers each, concepts in different corners
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert separation_loss(apart).item() == pytest.approx(expected)
    assert separation_loss(torch.ones(2, 2, 1, 1, 2)).item() == pytest.approx(math.log(3))


def test_mole_clip_loss_by_hand():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert mole_clip_loss(x, y, x, x - y).item() == pytest.approx(-math.log(1.25))
    assert mole_clip_loss(y, x, x, x - y).item() == pytest.approx(-math.log(1e-3 / 2))  # 1 + 2 > 2.5
    assert mole_clip_loss(x, torch.zeros(1, 2), (x + y) / 2**0.5, x - y).item() > -math.log(1.25)


def test_softened_by_hand():
    pictures = torch.zeros(1, 1, 8, 8)
    pictures[0, 0, 4, 4] = 9.0
    still, none = torch.zeros(1, 2), torch.zeros(1)
    torch.testing.assert_close(softened(pictures, still, none, torch.zeros(())), pictures, atol=1e-5, rtol=0)
    blurred = softened(pictures, still, none + 1, torch.ones(()))
    torch.testing.assert_close(blurred[0, 0, 3:6, 3:6], torch.full((3, 3), 2.0), atol=1e-5, rtol=0)
    moved = softened(pictures, torch.tensor([[1 / 8, 0.0]]), none, torch.zeros(()))
    assert moved[0, 0].argmax().item() == 4 * 8 + 3  # what stood at column 4 is found from column 3


def test_caption_loss_by_hand():
    captions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = caption_loss(torch.tensor([0.6, 0.8]), captions, torch.tensor(10.0))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(64, 64), (64, 48), (48, 64), (64, 32), (32, 64)])
def test_a_collage_has_the_cells_in_which_things_are_drawn(count, size):
    drawn = partition(count, *size)[:count]
    for box, cell in zip(cells(count, size[1], size[0]), drawn, strict=True):
        torch.testing.assert_close(region_mask(box, *size).round(), cell)


def test_pictures_stand_side_by_side_on_their_ground():
    pictures = torch.zeros(2, 1, 3, 8, 8)
    pictures[0, :, 0, 2:6, 2:6], pictures[1, :, 1, 2:6, 2:6] = 1, 1  # red, then green, on black
    sheet = side_by_side(pictures)[0]  # [3, 8, 8]
    for channel, left in ((0, 1), (1, 5)):
        wanted = torch.zeros(8, 8)
        wanted[3:5, left : left + 2] = 1
        assert torch.equal(sheet[channel], wanted)
    wide = side_by_side(pictures, 16, 8)[0]
    assert torch.equal(wide, torch.cat([pictures[0, 0], pictures[1, 0]], -1))  # there is room for both as they are
    tall = side_by_side(pictures, 8, 20)[0]  # a cell is 10 high
    assert torch.equal(tall[0, 3:7, 2:6], torch.ones(4, 4))
    assert torch.equal(tall[1, 13:17, 2:6], torch.ones(4, 4))
    assert tall.sum() == 32
    three = side_by_side(torch.stack([torch.full((1, 3, 4, 4), v) for v in (0.1, 0.2, 0.3)]), 8, 8)[0, 0]
    quarters = [[three[y, x].item() for x in (1, 5)] for y in (1, 5)]  # three stand in the quarters of a square
    assert quarters[0] == pytest.approx([0.1, 0.2])
    assert quarters[1][0] == pytest.approx(0.3)
    grey = side_by_side(torch.full((3, 2, 3, 9, 9), 0.25))
    assert torch.equal(grey, torch.full_like(grey, 0.25))
