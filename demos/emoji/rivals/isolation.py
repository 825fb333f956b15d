"""Isolation until half: subjects in given regions do not see one another in self-attention, up to a share of the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mole_diffusers import Mixture
from mole_diffusers.binding import AUTO, Region
from rivals.regional_composers import RegionalPrompt, place_mask, regional_prompts
from rivals.unet_calls import StepCounter, before_forward, grid_of, prompted_rows, sampling_steps

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
    counter, closed, latents = StepCounter(), False, torch.empty(0, 0)

    def begin(_: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal closed, latents
        closed = counter.at(args, kwargs) < until * sampling_steps(pipe) and len(regions) > 1
        latents = args[0] if args else kwargs["sample"]

    def close(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not closed:
            return None
        hidden, rows = args[0], prompted_rows(pipe, latents)  # [B, T, C], [B]
        masks = torch.stack([place_mask(region, latents.shape[-2:]) for region in regions])
        there = F.adaptive_avg_pool2d(masks[None], grid_of(hidden.shape[1], latents))[0].flatten(1) > 0.5  # [K, T]
        allowed = attends(there).to(rows.device) | ~rows[:, None, None]  # [B, T, T]
        bias = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~allowed, -torch.inf)
        return args, {**kwargs, "attention_mask": bias}

    with ExitStack() as undo:
        undo.enter_context(before_forward(pipe.unet, begin))
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn1"):
                undo.enter_context(before_forward(module, close))
        yield


def attends(there: torch.Tensor) -> torch.Tensor:
    """Regions at each place, [K, T] bool -> which places each place attends to, [T, T] bool."""
    shared = (there[:, :, None] & there[:, None]).any(0)
    background = ~there.any(0)
    return shared | background[None] | background[:, None]
