"""The maths of the losses; needs only torch. B batch, C channels, N experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mole_diffusers.binding.layout import grid

TEMPERATURE = 0.5  # of `separation_loss`


def recovery_error(student: torch.Tensor, teacher: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """How much of the teacher's change is missing: ||student - teacher||^2 / E ||teacher - base||^2, mean over B.

    0 is the teacher, 1 is the base. 1 minus this is a recovery that can be compared across experts and timesteps.

    Args:
        student, teacher: predictions [B, C, H, W].
        norm: [B], the expected squared change E ||teacher - base||^2 per element for each row's source and timestep.
    """
    error = (student - teacher).square().flatten(1).mean(1)  # [B]
    return (error / (norm + 1e-8)).mean()


def composed_target(base: torch.Tensor, experts: torch.Tensor, masks: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """e_0 + sum_k s_k M_k (e_k - e_0): each expert's change of the base, inside its mask.

    Masked blending as in FreeFuse and CLoRA for subjects; with a mask of ones, score addition (Liu et al., 2022) for
    a style.

    Args:
        base: [B, C, H, W] prediction without experts.
        experts: [N, B, C, H, W] predictions with one expert each.
        masks: [N, B, 1, H, W] in 0..1.
        strengths: [N].
    """
    changes = (experts - base) * masks * strengths.reshape(-1, 1, 1, 1, 1)
    return base + changes.sum(0)


def territory(maps: torch.Tensor) -> torch.Tensor:
    """Attention maps of N competing concepts [N, B, H, W] -> soft masks [N, B, 1, H, W] that sum to 1 at each pixel.

    Each map is normalised to mean 0 and standard deviation 1 over the picture; then follows a softmax over concepts. So
    a concept with weak attention still gets the region where it is strongest.
    """
    mean, std = maps.mean((2, 3), keepdim=True), maps.std((2, 3), keepdim=True)
    return torch.softmax(3 * (maps - mean) / (std + 1e-6), 0)[:, :, None]


def caption_loss(picture: torch.Tensor, captions: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the first caption among all of them, for one picture: features [D] and [P, D] of length 1."""
    return -torch.log_softmax(scale * (captions @ picture), 0)[0]


def softened(pictures: torch.Tensor, shift: torch.Tensor, blur: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] moved by `shift` [B, 2] (in sides), mixed by `blur` [B] with a 3 x 3 mean, plus `noise`.

    A reward on these cannot be increased by a pattern of single pixels.
    """
    placed = torch.eye(2, 3, device=pictures.device).repeat(len(pictures), 1, 1)  # [B, 2, 3]
    placed[:, :, 2] = 2 * shift  # an affine grid is 2 wide and high
    grid = F.affine_grid(placed, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    mean = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return moved.lerp(mean, blur.reshape(-1, 1, 1, 1)) + noise


def mole_clip_loss(
    picture: torch.Tensor, source: torch.Tensor, caption: torch.Tensor, direction: torch.Tensor
) -> torch.Tensor:
    """L_D of MoLE as its authors ran it: -log((2.5 - (l_g + l_d)) / 2), mean over B; about -0.22 is perfect.

    l_g is 1 - cos(picture, caption). l_d is from StyleGAN-NADA (Gal et al., 2022): 1 - the cosine between the change
    from the source picture to this one, and `direction`, the change from the source's text to the caption. Features [B, D]
    of length 1, and a difference of such.
    """
    whole = 1 - F.cosine_similarity(picture, caption, -1)  # [B]
    turned = 1 - F.cosine_similarity(picture - source, direction, -1)
    # If both are at their worst, this would be the log of a negative number.
    return -((2.5 - whole - turned).clamp_min(1e-3) / 2).log().mean()


def separation_loss(maps: torch.Tensor) -> torch.Tensor:
    """InfoNCE over cross-attention as in CLoRA (Meral et al., 2024): pulls each concept's maps together and apart from
    others'.

    The maps of one concept in different layers are each other's positives; those of other concepts are the negatives.

    Args:
        maps: [K, L, B, H, W], K concepts of 2 or more, L layers of 2 or more.
    """
    concepts, layers = maps.shape[:2]
    rows = F.normalize(maps.flatten(3).permute(2, 0, 1, 3).flatten(1, 2), dim=-1)  # [B, K * L, H * W]
    itself = torch.eye(concepts * layers, dtype=torch.bool, device=maps.device)
    owner = torch.arange(concepts, device=maps.device).repeat_interleave(layers)
    same = (owner[:, None] == owner[None]) & ~itself  # [K * L, K * L]
    logits = (rows @ rows.transpose(1, 2) / TEMPERATURE).masked_fill(itself, -torch.inf)
    shares = torch.log_softmax(logits, -1).masked_fill(~same, 0)  # indexing with the mask would wait for the device
    return -shares.sum() / (len(rows) * concepts * layers * (layers - 1))


def cells(count: int, width: int, height: int) -> list[tuple[float, float, float, float]]:
    """The cells of a collage of this size, as boxes (left, top, right, bottom) in 0..1, the first at the left or top."""
    down, across = grid(count, height, width)
    corners = [(i % across, i // across) for i in range(count)]
    return [(x / across, y / down, (x + 1) / across, (y + 1) / down) for x, y in corners]


def side_by_side(pictures: torch.Tensor, width: int | None = None, height: int | None = None) -> torch.Tensor:
    """Collages [B, 3, height, width] of N pictures each [N, B, 3, H, W], by default of the size of one picture.

    Each picture stands in the middle of its cell, see `layout.grid`, shrunk if necessary. The background is the median
    colour of the pictures' edges.
    """
    count, batch, _, *own = pictures.shape
    height, width = height or own[0], width or own[1]
    edges = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]], -1)  # [N, B, 3, E]
    background = edges.transpose(0, 1).transpose(1, 2).flatten(2).median(-1).values  # [B, 3]
    sheet = background[..., None, None].expand(batch, 3, height, width).clone()
    down, across = grid(count, height, width)
    cell = (height // down, width // across)
    scale = min(1.0, cell[0] / own[0], cell[1] / own[1])
    high, wide = (int(side * scale) for side in own)
    for i, picture in enumerate(pictures):
        left, top = i % across * cell[1] + (cell[1] - wide) // 2, i // across * cell[0] + (cell[0] - high) // 2
        sheet[..., top : top + high, left : left + wide] = F.interpolate(picture, (high, wide), mode="area")
    return sheet
