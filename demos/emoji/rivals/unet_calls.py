"""What the rivals need of a UNet that is called by a pipeline: its steps, its guided rows, its layers' sizes, and hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from mole_diffusers.binding import GridSize


@contextmanager
def replaced_forward(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, calls of `module` go to `run`. Calls that `run` itself makes go to the module."""
    found, is_inside = module.forward, False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        if is_inside:
            return found(*args, **kwargs)
        is_inside = True
        try:
            return run(*args, **kwargs)
        finally:
            is_inside = False

    with patch.object(module, "forward", forward):
        yield


@contextmanager
def before_forward(module: nn.Module, hook: Callable[[Any, tuple, dict], Any]) -> Iterator[None]:
    """Call `hook(module, args, kwargs)` before each forward of `module` while the block runs; it may return both anew."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def sampling_steps(pipe: Any) -> int:
    """The number of steps of the picture that is drawn. (Some samplers call the model several times at a timestep.)"""
    return len(set(pipe.scheduler.timesteps.tolist()))


class StepCounter:
    """Counts sampling steps by the timesteps that a UNet is given. A step noisier than the last one starts a new picture."""

    def __init__(self) -> None:
        self.step, self.last = 0, float("-inf")

    def at(self, args: tuple, kwargs: dict) -> int:
        """The step, from 0, of a UNet's call."""
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        now = float(torch.as_tensor(time).reshape(-1)[0])
        self.step = 0 if now > self.last else self.step + (now < self.last)
        self.last = now
        return self.step


def prompted_rows(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """[B] bool: the rows of a UNet's call that read the prompt. With classifier-free guidance, the first half does not."""
    rows = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
    if pipe.do_classifier_free_guidance:
        rows[: len(rows) // 2] = False
    return rows


def grid_of(tokens: int, latents: torch.Tensor) -> GridSize:
    """Height and width of a UNet's layer with this many tokens. Each level has half the side of the last, rounded up."""
    height, width = latents.shape[-2:]
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return height, width
