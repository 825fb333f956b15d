"""A frozen CLIP that rates how well pictures fit captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mole_diffusers.functional import onto

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Clip:
    """A frozen transformers CLIPModel with its tokenizer, and the mean and standard deviation of its pictures in 0..1."""

    model: Any
    tokenizer: Any
    mean: Sequence[float] = HALF
    std: Sequence[float] = HALF

    @property
    def scale(self) -> torch.Tensor:
        """The learned inverse temperature: logits are this times the cosines."""
        return self.model.logit_scale.exp()

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> torch.Tensor:
        """[P, D] features of length 1."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids = ids.to(self.model.device)
        pooled = self.model.text_model(**ids).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] in -1..1, as the autoencoder decodes them -> [B, D] features of length 1, with gradient."""
        mean, std = (onto(torch.tensor(v), pixels.device).reshape(1, 3, 1, 1) for v in (self.mean, self.std))
        side = self.model.config.vision_config.image_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)
        x = ((pixels / 2 + 0.5).clamp(0, 1) - mean) / std
        pooled = self.model.vision_model(pixel_values=x.to(self.model.device, self.model.dtype)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)


def read_clip(source: str | Path, *, device: Any = "cpu") -> Clip:
    """Load a CLIP with its tokenizer from a folder or hub id, frozen, fp32. Raises OSError if there is none."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(source, dtype=torch.float32).to(device).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(source)
    try:
        processor = CLIPImageProcessor.from_pretrained(source)
    except OSError:  # no processor config: pictures in -1..1
        return Clip(model, tokenizer)
    return Clip(model, tokenizer, tuple(processor.image_mean), tuple(processor.image_std))
