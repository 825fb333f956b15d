"""What a picture looks like while it is drawn."""

from __future__ import annotations

import time
from typing import Any

import torch
from PIL import Image

PREVIEW_SHARE = 0.2  # of the time goes into previews at most


class Previews:
    """Decoded latents now and then, so that previews take a small share of the time."""

    def __init__(self, pipe: Any):
        self.pipe, self._cost, self._last = pipe, 0.0, 0.0

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> Image.Image | None:
        begun = time.monotonic()
        if begun - self._last < self._cost / PREVIEW_SHARE:
            return None
        vae = self.pipe.vae
        decoded = vae.decode(latents[:1].to(vae.dtype) / vae.config.scaling_factor).sample
        image = self.pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        self._last = time.monotonic()
        self._cost = self._last - begun
        return image
