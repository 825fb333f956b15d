"""Where each thing is drawn: its place in the latents, and the window around it that the UNet draws."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOM = 0.75  # a place has room if its sides are at least this share of the side that the UNet was trained at
MEETING = 3 / 16  # of that side: so near to another's place, silhouettes decide whose it is
STEADY = 0.5  # share of the silhouettes of earlier steps in that of a step
INSIDE, OUTSIDE = 0.6, 0.3  # how much guidance changes a thing and what is around it, relative to where it changes most
Box = tuple[int, int, int, int]  # top, bottom, left, right, in latent pixels


class Window(NamedTuple):
    """A place, and the part of the latents that is drawn for it."""

    mask: torch.Tensor  # [H, W] in 0..1
    box: Box

    def has_room(self, trained: int) -> bool:
        """Whether it is at least as large as the pictures that a UNet was trained with, and its place not much smaller."""
        (top, bottom, left, right), (first, last, begin, end) = self.box, extent(self.mask)
        return min(bottom - top, right - left) >= trained and min(last - first, end - begin) >= ROOM * trained


def extent(mask: torch.Tensor) -> Box:
    """The smallest box around a mask [H, W]; all 0 if it is empty."""
    if not mask.any():
        return 0, 0, 0, 0
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def around(mask: torch.Tensor, trained: int, step: int) -> Window:
    """The window of a place [H, W]. One that is a little smaller than what a UNet was trained with is enlarged to that.

    Its sides are multiples of `step`, so that a UNet can halve it without a remainder.
    """
    sides = (*extent(mask)[:2], mask.shape[0]), (*extent(mask)[2:], mask.shape[1])
    grows = all(end - begin >= ROOM * trained for begin, end, _ in sides)
    top, bottom, left, right = (
        edge
        for begin, end, size in sides
        for edge in (
            _centred((begin + end) / 2, trained, size)
            if grows and end - begin < trained
            else (begin // step * step, min(-(-end // step) * step, size))
        )
    )
    return Window(mask, (top, bottom, left, right))


def _centred(middle: float, length: int, size: int) -> tuple[int, int]:
    """Begin and end of `length` pixels around a middle, inside of `size` pixels."""
    length = min(length, size)
    begin = min(max(0, round(middle - length / 2)), size - length)
    return begin, begin + length


def touching(height: int, width: int, trained: int, stacked: bool) -> list[Window]:
    """Two windows that overlap by half, in the middle of the picture: one above the other, or side by side.

    Each place is the window up to the middle between them.
    """
    length, across = (height, width) if stacked else (width, height)
    found = []
    for side in (-1, 1):
        along = _centred(length / 2 + side * trained / 4, trained, length)
        rest = _centred(across / 2, trained, across)
        box = (*along, *rest) if stacked else (*rest, *along)
        mask = torch.zeros(height, width)
        mask[box[0] : box[1], box[2] : box[3]] = 1
        half = mask[: height // 2] if stacked else mask[:, : width // 2]
        other = mask[height // 2 :] if stacked else mask[:, width // 2 :]
        (other if side < 0 else half).zero_()
        found.append(Window(mask, box))
    return found


def meeting_of(first: Window, second: Window, trained: int) -> torch.Tensor | None:
    """[H, W] bool: what is near to both places and in both windows; None if there is nothing, or the places overlap."""
    if (first.mask * second.mask).any():
        return None
    reach = round(MEETING * trained)
    near = [F.max_pool2d(w.mask[None, None], 2 * reach + 1, 1, reach)[0, 0] > 0 for w in (first, second)]
    for near_it, (_, (top, bottom, left, right)) in zip(near, (first, second), strict=True):
        inside = torch.zeros_like(near_it)
        inside[top:bottom, left:right] = True
        near_it &= inside
    both = near[0] & near[1]
    return both if both.any() else None


def silhouette(guided: torch.Tensor) -> torch.Tensor:
    """Where a thing is in its window, [P, h, w] in 0..1.

    Args:
        guided: [P, C, h, w], what its prompt changes in the prediction: that with it, less that without.
    """
    change = F.avg_pool2d(guided.float().abs().mean(1, keepdim=True), 3, 1, 1)[:, 0]  # [P, h, w]
    strong = change.flatten(1).quantile(0.9, dim=1).clamp_min(1e-12)[:, None, None]
    return ((change / strong - OUTSIDE) / (INSIDE - OUTSIDE)).clamp(0, 1)
