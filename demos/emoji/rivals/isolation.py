"""Isolation until half: subjects in given regions do not see one another in self-attention, up to a share of the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mole_diffusers import Mixture
from mole_diffusers.binding import AUTO, Region
from mole_diffusers.binding.picture_layout import side_of
from mole_diffusers.patching.host.denoiser_inputs import DenoiserInputs, prompted_rows
from mole_diffusers.patching.undo import undoing
from rivals.regional_composers import RegionalPrompt, place_mask, regional_prompts
from rivals.sampling_composers import StepCounter, sampling_steps

UNTIL = 0.5  # of the steps; Krea2-Regional and the trials that led here: 0.4 to 0.6


@contextmanager
def isolated_prompts(
    pipe: Any, mixture: Mixture, prompt: str, parts: Mapping[str, RegionalPrompt], *, until: float = UNTIL
) -> Iterator[None]:
    """Regional prompts whose subjects are isolated at first, as in LoRA-Composer (arXiv 2403.11627) and Krea2-Regional.

    Arguments and errors are those of `regional_prompts` and `isolated`. What LoRA-Composer does to the latents is left out:
    gradients that put the attention to each subject's words into its box.
    """
    regions = [region for _, region in parts.values()]
    with isolated(pipe, regions, until=until), regional_prompts(pipe, mixture, prompt, parts):
        yield


@contextmanager
def isolated(pipe: Any, regions: Sequence[Region], *, until: float = UNTIL) -> Iterator[None]:
    """Close self-attention from each region into the others in the first steps of a picture.

    Up to the share `until` of the steps, a place in region k attends to region k and to the background, which is in no
    region and attends to everything. A place belongs to the regions that cover more than half of it; one that belongs to
    several attends to all of these. Rows without the prompt stay open.

    Raises ValueError for a pipeline without a UNet, a share outside of 0..1, or a region "auto".
    """
    if getattr(pipe, "unet", None) is None:
        raise ValueError(f"isolation needs a unet, unlike {type(pipe).__name__}")
    if not 0 <= until <= 1:
        raise ValueError(f"the share of steps in which regions are isolated is in 0..1, got {until}")
    if AUTO in regions:
        raise ValueError(f"isolation needs given regions, got {list(regions)}")
    inputs, counter = DenoiserInputs(pipe.unet), StepCounter(pipe.unet)
    closed = False
    latents, rows = torch.empty(0, 0), torch.empty(0)  # of the UNet's call, and which of its rows have the prompt

    def begin(_: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal closed, latents, rows
        closed = counter.at(args, kwargs) < until * sampling_steps(pipe) and len(regions) > 1
        latents = inputs.latents(args, kwargs)
        rows = prompted_rows(pipe, inputs.text(args, kwargs), latents)

    def close(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden, (height, width) = args[0], latents.shape[-2:]  # [B, T, C]
        side = side_of(hidden.shape[1], (height, width))
        if not closed or side is None:
            return None
        masks = torch.stack([place_mask(region, (height, width)) for region in regions])
        there = F.adaptive_avg_pool2d(masks[None], side)[0].flatten(1) > 0.5  # [K, T]
        allowed = attends(there).to(rows.device) | ~rows[:, None, None]  # [B, T, T]
        bias = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~allowed, -torch.inf)
        return args, {**kwargs, "attention_mask": bias}

    with undoing() as undo:
        undo.before_forward(pipe.unet, begin, with_kwargs=True)
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn1"):
                undo.before_forward(module, close, with_kwargs=True)
        yield


def attends(there: torch.Tensor) -> torch.Tensor:
    """Regions at each place, [K, T] bool -> which places each place attends to, [T, T] bool."""
    shared = (there[:, :, None] & there[:, None]).any(0)
    background = ~there.any(0)
    return shared | background[None] | background[:, None]
