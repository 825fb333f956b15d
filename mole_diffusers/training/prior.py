"""Pictures of a concept's class that the base draws itself: DreamBooth's prior preservation (Ruiz et al., 2023)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from mole_diffusers.lora.writing import save_atomically
from mole_diffusers.training.data import Samples
from mole_diffusers.training.denoising import latent_shape, sample

FILE = "prior.safetensors"


@torch.no_grad()
def class_samples(
    pipe: Any,
    prompt: str,
    *,
    count: int = 64,
    steps: int = 25,
    guidance: float = 7.5,
    seed: int = 0,
    batch: int = 4,
    folder: Path | None = None,
) -> Samples:
    """`count` pictures of the class, as the base draws `prompt` ("a photo of a dog"); latents, never decoded.

    Args:
        steps, guidance: of the sampler.
        batch: pictures at a time.
        folder: where they are kept, and found by a run that goes on.
    """
    kept, asked = folder / FILE if folder else None, json.dumps([prompt, count, steps, guidance, seed])
    if kept is not None and kept.exists():
        with safe_open(kept, "pt") as file:
            if (file.metadata() or {}).get("asked") == asked:
                return Samples(file.get_tensor("latents"), [prompt] * count)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *latent_shape(pipe), generator=generator)  # [count, C, H, W]
    drawn = [
        sample(pipe, rows.to(pipe.device), [prompt] * len(rows), steps=steps, guidance=guidance).cpu()
        for rows in tqdm(noise.split(batch), desc="class pictures", disable=count <= batch)
    ]
    samples = Samples(torch.cat(drawn), [prompt] * count)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_atomically({"latents": samples.latents}, kept, {"asked": asked})
    return samples
