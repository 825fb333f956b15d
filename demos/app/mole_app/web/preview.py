"""Previews of a picture while it is drawn: the clean latents that a step predicts, made visible in little time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from mole_diffusers.training import precise

SMALL = 4_000_000  # parameters of a decoder that is quick enough to be used at every step
SIDE, CELL = 256, 16  # pixels of the picture from which the colours of latents are learnt, and of its squares


class PreviewDecoder:
    """Latents [1, C, h, w] -> picture, of their size or that of the finished picture.

    A small decoder decodes them. In place of a large one, a linear map gives each latent its colour; it is fitted to the
    autoencoder once, on a picture of coloured squares.
    """

    def __init__(self) -> None:
        self._vae: Any = None
        self._colours = torch.empty(0, 3)  # [C + 1, 3], of this autoencoder

    @torch.no_grad()
    def __call__(self, pipe: Any, latents: torch.Tensor) -> Image.Image | None:
        """None for latents that are not those of one picture."""
        if latents.dim() != 4:
            return None
        if sum(weight.numel() for weight in pipe.vae.decoder.parameters()) <= SMALL:
            with precise(pipe) as vae:
                latents = latents[:1].to(vae.dtype) / vae.config.scaling_factor
                pictures = vae.decode(latents + (getattr(vae.config, "shift_factor", None) or 0)).sample
        else:
            if self._vae is not pipe.vae:
                with precise(pipe) as vae:
                    self._vae, self._colours = vae, fitted_colours(vae)
            pictures = coloured(latents[:1].float(), self._colours)
        image: Image.Image = pipe.image_processor.postprocess(pictures, output_type="pil")[0]
        return image


def coloured(latents: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] -> pictures [B, 3, h, w] around -1..1, by a linear map [C + 1, 3]."""
    rows = latents.movedim(1, -1)  # [B, h, w, C]
    return (rows @ colours[:-1].to(rows) + colours[-1].to(rows)).movedim(-1, 1)


def fitted_colours(vae: Any) -> torch.Tensor:
    """The linear map [C + 1, 3] from latents as a denoiser sees them to colours that fits an autoencoder best."""
    cells = torch.rand(1, 3, SIDE // CELL, SIDE // CELL, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = F.interpolate(cells, scale_factor=CELL, mode="nearest")  # [1, 3, SIDE, SIDE]
    weight = next(vae.parameters())
    found = vae.encode(picture.to(weight)).latent_dist.mode().float().cpu()  # [1, C, h, w]
    latents = (found - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
    wanted = F.adaptive_avg_pool2d(picture, latents.shape[2:]).movedim(1, -1).flatten(0, 2)  # [h w, 3]
    rows = latents.movedim(1, -1).flatten(0, 2)
    return torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], 1), wanted).solution
