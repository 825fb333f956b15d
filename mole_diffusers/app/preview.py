"""Previews of a picture while it is drawn, as long as they do not slow the drawing down."""

from __future__ import annotations

import time
from typing import Any

import torch
from PIL import Image

from mole_diffusers.training.latents import precise

SHARE = 0.2  # of the drawing time that previews may take


class PreviewDecoder:
    """Latents [1, C, h, w] -> picture, or None if decoding now would take more than SHARE of the time."""

    def __init__(self) -> None:
        self._cost, self._last = 0.0, 0.0  # seconds per preview; time of the last one

    @torch.no_grad()
    def __call__(self, pipe: Any, latents: torch.Tensor) -> Image.Image | None:
        begun = time.monotonic()
        if begun - self._last < self._cost / SHARE:
            return None
        with precise(pipe) as vae:
            shift = getattr(vae.config, "shift_factor", None) or 0
            decoded = vae.decode(latents[:1].to(vae.dtype) / vae.config.scaling_factor + shift).sample
        image: Image.Image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        self._last = time.monotonic()
        self._cost = self._last - begun
        return image
