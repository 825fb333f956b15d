"""A layout from attention: the part of the picture that each subject gets, decided once and kept from then on.

Here are cells of the picture and who gets which. Tiles take theirs from the same cells (`PromptSubjects.masks`); whether
there are tiles is decided in patching/subjects.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
import torch.nn.functional as F

MOST_SUBJECTS = 8  # at most; all orders of the subjects are tried
VIOLATED = 10.0  # the cost of contradicting the prompt's place words; scores are at most 1


def grid(count: int, height: int, width: int) -> tuple[int, int]:
    """How many cells `count` subjects have down and across: a row along the longer side, side by side in a square; three or
    four have quarters if the shape is about a square.
    """
    if count in (3, 4) and max(height, width) < 1.5 * min(height, width):
        return 2, 2
    return (count, 1) if height > width else (1, count)


def strips(count: int, length: int) -> torch.Tensor:
    """`count` equal parts of a side, [count, length] in 0..1."""
    middles = (torch.arange(length) / length + 0.5 / length) * count
    return torch.stack([(middles.floor() == i).float() for i in range(count)])


def partition(count: int, height: int, width: int, axes: Sequence[str] = ()) -> torch.Tensor:
    """Cells [C, height, width] in 0..1 for `count` subjects, C >= count, row by row.

    Args:
        axes: "x" or "y" for each relation from the prompt's place words; cells lie in a row along the first one. Without
            any, they lie as `grid` says.
    """
    down, across = {"x": (1, count), "y": (count, 1)}[axes[0]] if axes else grid(count, height, width)
    return torch.stack([row[:, None] * column for row in strips(down, height) for column in strips(across, width)])


def assign(
    maps: torch.Tensor, cells: torch.Tensor, relations: Sequence[tuple[int, int, str]] = ()
) -> tuple[list[int], float]:
    """Assign a cell to each subject, so that as much of its words' attention as possible lies in that cell.

    Args:
        maps: [K, H, W], attention of each subject's words.
        cells: [C, H, W] with C >= K.
        relations: (first, second, axis): the first has the smaller coordinate. This counts more than any map.

    Returns:
        The cell of each subject, and the margin: how much worse the next assignment is, as a mean share of a map.
    """
    share = maps / maps.sum((1, 2), keepdim=True).clamp_min(1e-12)
    score = torch.einsum("khw,chw->kc", share, cells)  # [K, C]
    orders = torch.tensor(list(permutations(range(len(cells)), len(maps))))  # [P, K]
    value = score[torch.arange(len(maps)), orders].mean(1)  # [P]
    for i, j, axis in relations:
        centre = _centres(cells, axis)  # [C]
        value = value - VIOLATED * (centre[orders[:, i]] >= centre[orders[:, j]])
    best = value.topk(min(2, len(value)))
    return orders[best.indices[0]].tolist(), float(best.values[0] - best.values[-1])


def _centres(cells: torch.Tensor, axis: str) -> torch.Tensor:
    """[C]: the mean coordinate of each cell."""
    along = cells.sum(1 if axis == "x" else 2)  # [C, length]
    return (along * torch.arange(along.shape[1])).sum(1) / along.sum(1)


def assigned_regions(
    maps: torch.Tensor,
    height: int,
    width: int,
    relations: Sequence[tuple[int, int, str]] = (),
    *,
    taken: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, float]:
    """The region of each subject, from what its words attend to.

    Args:
        maps: [K, h, w].
        relations: see `assign`.
        taken: masks [height, width] in 0..1 of the places of others, which these subjects do not get.

    Returns:
        The regions [K, height, width], and how certain they are: the share of attention by which the next assignment is
        worse.
    """
    free = 1 - torch.stack(list(taken)).amax(0) if taken else torch.ones(height, width)
    rows, columns = (
        (free > 0.5).any(axis).nonzero().flatten().tolist() or [0, size - 1] for axis, size in ((1, height), (0, width))
    )
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    cells = partition(len(maps), bottom - top, right - left, [axis for _, _, axis in relations])
    cells = F.pad(cells, (left, width - right, top, height - bottom)) * free
    maps = F.interpolate(maps[None], (height, width), mode="bilinear")[0]
    order, margin = assign(maps, cells, relations)
    return cells[order], margin
