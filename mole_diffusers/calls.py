"""What a denoiser is called with. UNets and transformers name their inputs, and count their time, in different ways."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

DENOISERS = ("unet", "transformer")


class CallReader:
    """Reads the arguments of one denoiser's forward, given by position or by name."""

    def __init__(self, denoiser: nn.Module):
        self.names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.pure_noise = 1 if isinstance(denoiser, FluxTransformer2DModel) else 1000  # the timestep of pure noise

    def _read(self, name: str, args: tuple, kwargs: dict) -> Any:
        return kwargs[name] if name in kwargs else args[self.names.index(name)]

    def time(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """The noise level [B], 0..1, where 1 is pure noise."""
        sample = self._read("sample" if "sample" in self.names else "hidden_states", args, kwargs)
        time = torch.as_tensor(self._read("timestep", args, kwargs), device=sample.device)
        return time.float().reshape(-1).expand(sample.shape[0]) / self.pure_noise

    def text(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """The text states [B, T, C]; B may be a multiple of the samples' where the samples are films."""
        return self._read("encoder_hidden_states", args, kwargs)


def compiled_from(model: Any) -> Any:
    """The model inside what `torch.compile(model)` returns; any other model itself."""
    return getattr(model, "_orig_mod", model)
