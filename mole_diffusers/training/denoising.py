"""The diffusion side of training: noising, what the model should predict, and its answer in one form for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch.utils.checkpoint import checkpoint

from mole_diffusers.training.data import Draw, Samples, token_ids


def training_scheduler(pipe: Any) -> DDIMScheduler:
    """The pipeline's noise schedule as DDIM: any sampler's own may take other arguments, and none loses its state."""
    return DDIMScheduler.from_config(pipe.scheduler.config)


def embed(pipe: Any, prompts: Sequence[str]) -> torch.Tensor:
    """[B, T, C] what the text encoder makes of prompts."""
    return pipe.text_encoder(token_ids(pipe, prompts))[0]


def predict(pipe: Any, x: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """What the UNet predicts for noisy latents x [B, C, H, W] under one prompt each, in its own parametrisation, fp32."""
    return _predict(pipe, x, timesteps, embed(pipe, prompts))


def _predict(pipe: Any, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    def call(x: torch.Tensor) -> torch.Tensor:
        return pipe.unet(x.to(text.dtype), timesteps, text).sample.float()

    if torch.is_grad_enabled() and pipe.unet.is_gradient_checkpointing:
        # Each call tells the gates its noise level; blocks computed again alone would be told that of the last call.
        return checkpoint(call, x, use_reentrant=False)
    return call(x)


def latent_shape(pipe: Any) -> tuple[int, int, int]:
    """(C, H, W) of the latents that the UNet was made for."""
    config = pipe.unet.config
    side = config.sample_size if not isinstance(config.sample_size, int) else (config.sample_size,) * 2
    return (config.in_channels, *side)


def sample(
    pipe: Any,
    x: torch.Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    checkpointing: bool = False,
    stop: int | None = None,
) -> torch.Tensor:
    """Deterministic DDIM (Song et al., 2021) from noise x [B, C, H, W] to clean latents, with the gradient of every step.

    Args:
        guidance: classifier-free guidance; 1 leaves the unconditional row out.
        checkpointing: compute each step's activations again in the backward pass.
        stop: steps to take; None takes all.
    """
    scheduler = training_scheduler(pipe)
    scheduler.set_timesteps(steps, device=x.device)
    guided = guidance != 1
    text = embed(pipe, [*([""] * len(x) if guided else []), *prompts])  # [B or 2B, T, C]

    def step(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([x, x]) if guided else x
        prediction = _predict(pipe, rows, t.expand(len(rows)), text)
        if guided:
            empty, full = prediction.chunk(2)
            prediction = empty + guidance * (full - empty)
        return scheduler.step(prediction, t, x).prev_sample

    for t in scheduler.timesteps[:stop]:
        x = checkpoint(step, x, t, use_reentrant=False) if checkpointing else step(x, t)
    return x


def decode(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Clean latents [B, C, H, W] -> pictures [B, 3, 8H, 8W] around -1..1, fp32, with their gradient."""
    return pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample.float()


def target(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the model should predict: the noise, or the velocity (Salimans & Ho 2022), as the scheduler is set."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction type {kind!r} cannot be trained; known: ['epsilon', 'v_prediction']")


def denoising_loss(pipe: Any, samples: Samples, draw: Draw, *, drop: float = 0.1) -> torch.Tensor:
    """The diffusion training loss on a random batch: MSE of the prediction, uniform timesteps.

    `drop` is the share of captions replaced by the empty prompt, so that guidance keeps its unconditional side.
    """
    pick, dropped = draw.choice(len(samples.latents)), (draw.uniform() < drop).tolist()
    prompts = ["" if gone else samples.captions[i] for i, gone in zip(pick, dropped, strict=True)]
    latents = samples.latents[pick].to(pipe.device)
    noise = draw.normal(*latents.shape[1:]).to(pipe.device)
    scheduler = training_scheduler(pipe)
    timesteps = torch.tensor(draw.choice(scheduler.config.num_train_timesteps), device=pipe.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return F.mse_loss(predict(pipe, noisy, timesteps, prompts), target(scheduler, latents, noise, timesteps))
