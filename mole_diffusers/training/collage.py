"""An objective for several subjects without data: pictures of each alone, set side by side."""

from __future__ import annotations

from typing import Any

import torch

from mole_diffusers.training.data import Samples, encode_pixels
from mole_diffusers.training.denoising import decode, denoising_loss, latent_shape, sample, training_scheduler
from mole_diffusers.training.losses import side_by_side
from mole_diffusers.training.study import Study, Term, named


def collage(
    study: Study, *, pictures: int = 32, seeds: int = 12, steps: int = 12, guidance: float = 3.0, redraw: float = 0.0
) -> Term:
    """The diffusion loss on collages: each subject of a prompt drawn under its own experts, shrunk, set side by side. Ours.

    A sum of LoRAs mixes subjects up. A collage shows the composed prompt over each subject as its own LoRA draws it, so the
    gates learn to keep them apart. It needs the `parts` of a composed prompt. Where these leave out a style, `redraw` puts
    it over the collage, which then is where the style's own start: subjects first, the style in what is left of the way.

    Args:
        pictures: collages per composed prompt.
        seeds, steps, guidance: pictures per part, and how they are sampled. The loss is that of the guided prediction:
            fitted to the unguided one, pictures that guidance made would be guided twice.
        redraw: share of the noise levels, 0..1, over which the collages are drawn again under the composed prompt by the
            plain sum of all experts (SDEdit; Meng et al., ICLR 2022).

    Raises ValueError for a lesson without parts, or a `redraw` outside 0..1.
    """
    if not 0 <= redraw <= 1:
        raise ValueError(f"redraw must be from 0 to 1, got {redraw}")
    if not study.lesson.parts:
        raise ValueError("the collage term needs the parts of composed prompts")
    generator = torch.Generator().manual_seed(study.seed)
    latents, captions = [], []
    for prompt, parts in study.lesson.parts.items():
        drawn = [_alone(study, part, generator, seeds=seeds, steps=steps, guidance=guidance) for part in parts]
        picks = torch.randint(0, seeds, (len(parts), pictures), generator=generator)
        sheets = side_by_side(torch.stack([d[pick] for d, pick in zip(drawn, picks, strict=True)]))
        sheets = encode_pixels(study.pipe, sheets)  # [pictures, C, h, w]
        if round(steps * redraw):
            start = steps - round(steps * redraw)
            sheets = _again(study, sheets, prompt, generator, steps=steps, start=start, guidance=guidance)
        latents.append(sheets)
        captions += [prompt] * pictures
    samples = Samples(torch.cat(latents), captions)
    return lambda draw: denoising_loss(study.pipe, samples, draw, guidance=guidance)


@torch.no_grad()
def _alone(
    study: Study, prompt: str, generator: torch.Generator, *, seeds: int, steps: int, guidance: float
) -> torch.Tensor:
    """Pictures [seeds, 3, H, W] of a prompt under the experts that it names, at their strengths."""
    pipe, mixture = study.pipe, study.mixture
    noise = torch.randn(seeds, *latent_shape(pipe), generator=generator).to(pipe.device)
    with mixture.fixed({name: mixture.strength(name) for name in named(mixture, prompt)}):
        return decode(pipe, sample(pipe, noise, [prompt] * seeds, steps=steps, guidance=guidance))


@torch.no_grad()
def _again(study: Study, latents: torch.Tensor, prompt: str, generator: torch.Generator, **sampler: Any) -> torch.Tensor:
    """Latents [B, C, h, w] noised to the level of step `start` and drawn to the end by the plain sum of all experts."""
    pipe, mixture = study.pipe, study.mixture
    scheduler = training_scheduler(pipe)
    scheduler.set_timesteps(sampler["steps"])
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, scheduler.timesteps[sampler["start"]].expand(len(latents)))
    with mixture.fixed({name: mixture.strength(name) for name in mixture.experts}):
        return sample(pipe, noisy.to(pipe.device), [prompt] * len(latents), **sampler).cpu()
