"""Where each subject is drawn: its place in the latents, and the window around it that the denoiser draws, in its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mole_diffusers.patching.host.cropping import Box

ROOM = 0.75  # a place has room if its sides are at least this share of the side that the denoiser was trained at
BORDER = 3 / 16  # of that side: so near to another's place, silhouettes decide whose it is
STEADY = 0.5  # share of the silhouettes of earlier steps in that of a step
INSIDE, OUTSIDE = 0.6, 0.3  # how much guidance changes a subject and what is around it, relative to where it changes most


class Window(NamedTuple):
    """A place, and the part of the latents that is drawn for it."""

    mask: torch.Tensor  # [H, W] in 0..1
    box: Box

    def has_room(self, trained: int) -> bool:
        """Whether it is at least as large as pictures that a denoiser was trained with, and its place not much smaller."""
        (top, bottom, left, right), (first, last, begin, end) = self.box, extent(self.mask)
        return min(bottom - top, right - left) >= trained and min(last - first, end - begin) >= ROOM * trained


def extent(mask: torch.Tensor) -> Box:
    """The smallest box around a mask [H, W]; all 0 if it is empty."""
    if not mask.any():
        return 0, 0, 0, 0
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def window_around(mask: torch.Tensor, trained: int, step: int) -> Window:
    """The window of a place [H, W]. One that is a little smaller than what a denoiser was trained with is enlarged.

    Its sides are multiples of `step`, so that the denoiser can halve it without a remainder.
    """
    layer_sizes = (*extent(mask)[:2], mask.shape[0]), (*extent(mask)[2:], mask.shape[1])
    grows = all(end - begin >= ROOM * trained for begin, end, _ in layer_sizes)
    top, bottom, left, right = (
        edge
        for begin, end, size in layer_sizes
        for edge in (
            _centred((begin + end) / 2, trained, size)
            if grows and end - begin < trained
            else (begin // step * step, min(-(-end // step) * step, size))
        )
    )
    return Window(mask, (top, bottom, left, right))


def _centred(middle: float, length: int, size: int) -> tuple[int, int]:
    """Begin and end of `length` pixels around a middle, inside of `size` tokens."""
    length = min(length, size)
    begin = min(max(0, round(middle - length / 2)), size - length)
    return begin, begin + length


def windows_of_two_that_touch(height: int, width: int, trained: int, step: int, stacked: bool) -> list[Window]:
    """Two windows, one above the other or side by side, that share half of `trained` tokens in the middle of the picture.

    Each place is a half of the picture. Sides are multiples of `step`, as those of the picture.
    """
    length = height if stacked else width
    side = min(-(-(length // 2 + trained // 4) // step) * step, length)
    found = []
    for is_second in (False, True):
        along = (length - side, length) if is_second else (0, side)
        half = (length // 2, length) if is_second else (0, length // 2)
        mask = torch.zeros(height, width)
        mask[slice(*half) if stacked else slice(None), slice(None) if stacked else slice(*half)] = 1
        found.append(Window(mask, (*along, 0, width) if stacked else (0, height, *along)))
    return found


def border_of(first: Window, second: Window, trained: int) -> torch.Tensor | None:
    """[H, W] bool: what is near to both places and in both windows.

    None if the places overlap, or the windows do not share enough to hold it.
    """
    reach = round(BORDER * trained)
    top, bottom, left, right = (
        choose(pair) for choose, pair in zip((max, min, max, min), zip(first.box, second.box, strict=True), strict=True)
    )
    if min(bottom - top, right - left) < max(1, 2 * reach) or torch.minimum(first.mask, second.mask).max() > 0.5:
        return None
    near = [F.max_pool2d(each.mask[None, None], 2 * reach + 1, 1, reach)[0, 0] > 0 for each in (first, second)]
    shared = torch.zeros_like(near[0])
    shared[top:bottom, left:right] = True
    both = near[0] & near[1] & shared
    return both if both.any() else None


def silhouette(guided: torch.Tensor) -> torch.Tensor:
    """Where a subject is in its window, [P, h, w] in 0..1.

    Args:
        guided: [P, C, h, w], what its prompt changes in the prediction: that with it, less that without.
    """
    change = F.avg_pool2d(guided.float().abs().mean(1, keepdim=True), 3, 1, 1)[:, 0]  # [P, h, w]
    strong = change.flatten(1).quantile(0.9, dim=1).clamp_min(1e-12)[:, None, None]
    return ((change / strong - OUTSIDE) / (INSIDE - OUTSIDE)).clamp(0, 1)
