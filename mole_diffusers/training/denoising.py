"""The diffusion side of training: noising, what the model should predict, and its answer in one form for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from mole_diffusers.training.data import Samples, token_ids


def training_scheduler(pipe: Any) -> DDIMScheduler:
    """The pipeline's noise schedule as DDIM: any sampler's own may take other arguments, and none loses its state."""
    return DDIMScheduler.from_config(pipe.scheduler.config)


def predict(pipe: Any, x: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """What the UNet predicts for noisy latents x [B, C, H, W] under one prompt each, in its own parametrisation, fp32."""
    text = pipe.text_encoder(token_ids(pipe, prompts))[0]  # [B, T, C]
    return pipe.unet(x.to(text.dtype), timesteps, text).sample.float()


def target(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the model should predict: the noise, or the velocity (Salimans & Ho 2022), as the scheduler is set."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction type {kind!r} cannot be trained; known: ['epsilon', 'v_prediction']")


def denoising_loss(
    pipe: Any, samples: Samples, generator: torch.Generator, *, batch: int, drop: float = 0.1
) -> torch.Tensor:
    """The diffusion training loss on a random batch: MSE of the prediction, uniform timesteps.

    `drop` is the share of captions replaced by the empty prompt, so that guidance keeps its unconditional side.
    """
    pick = torch.randint(0, len(samples.latents), (batch,), generator=generator)
    dropped = (torch.rand(batch, generator=generator) < drop).tolist()
    prompts = ["" if gone else samples.captions[i] for i, gone in zip(pick.tolist(), dropped, strict=True)]
    latents = samples.latents[pick]
    noise = torch.randn(latents.shape, generator=generator).to(pipe.device)
    scheduler = training_scheduler(pipe)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (batch,), generator=generator).to(pipe.device)
    latents = latents.to(pipe.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return F.mse_loss(predict(pipe, noisy, timesteps, prompts), target(scheduler, latents, noise, timesteps))
