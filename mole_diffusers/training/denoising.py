"""The diffusion side of training: noising, what the model should predict, and its answer in one form for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch.utils.checkpoint import checkpoint

from mole_diffusers.functional import onto
from mole_diffusers.training.data import Draw, Samples, token_ids


def training_scheduler(pipe: Any) -> DDIMScheduler:
    """The pipeline's noise schedule as DDIM: any sampler's own may take other arguments, and none loses its state."""
    return DDIMScheduler.from_config(pipe.scheduler.config)


def embed(pipe: Any, prompts: Sequence[str]) -> torch.Tensor:
    """[B, T, C] what the text encoder makes of prompts."""
    return pipe.text_encoder(onto(token_ids(pipe, prompts), pipe.device))[0]


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


def _guided_text(pipe: Any, prompts: Sequence[str], guidance: float) -> torch.Tensor:
    """Text states [2B, T, C], the empty prompt's before each prompt's; [B, T, C] where guidance is 1."""
    return embed(pipe, [*([""] * len(prompts) if guidance != 1 else []), *prompts])


def _guided(pipe: Any, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, *, guidance: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022): e_0 + guidance (e - e_0), [B, C, H, W]."""
    if guidance == 1:
        return _predict(pipe, x, timesteps, text)
    empty, full = _predict(pipe, torch.cat([x, x]), torch.cat([timesteps, timesteps]), text).chunk(2)
    return empty + guidance * (full - empty)


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
    start: int = 0,
    stop: int | None = None,
) -> torch.Tensor:
    """Deterministic DDIM (Song et al., 2021) from noise x [B, C, H, W] to clean latents, with the gradient of every step.

    Args:
        guidance: classifier-free guidance; 1 leaves the unconditional row out.
        checkpointing: compute each step's activations again in the backward pass.
        start, stop: the steps to take, from..to; x has the noise of `start`; None goes to the end.
    """
    scheduler = training_scheduler(pipe)
    scheduler.set_timesteps(steps)  # its numbers stay on the CPU, where to read one waits for no device
    text = _guided_text(pipe, prompts, guidance)

    def step(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        prediction = _guided(pipe, x, onto(t.expand(len(x)), x.device), text, guidance=guidance)
        return scheduler.step(prediction, t, x).prev_sample

    for t in scheduler.timesteps[start:stop]:
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


def denoising_loss(pipe: Any, samples: Samples, draw: Draw, *, drop: float = 0.1, guidance: float = 1.0) -> torch.Tensor:
    """The diffusion training loss on a random batch: MSE of the prediction, uniform timesteps.

    Args:
        drop: share of captions replaced by the empty prompt, so that guidance keeps its unconditional side; none are where
            the prediction is guided.
        guidance: what the prediction is guided by. 1 is the plain loss, right for pictures that are to be imitated by the
            conditional model; pictures that a guided sampler made ask for the guidance that they will be drawn with.
    """
    pick = draw.choice(len(samples.latents))
    dropped = draw.uniform() < (drop if guidance == 1 else 0.0)
    prompts = ["" if gone else samples.captions[i] for i, gone in zip(pick, dropped.tolist(), strict=True)]
    latents = samples.latents[pick]
    noise, scheduler = draw.normal(*latents.shape[1:]), training_scheduler(pipe)
    timesteps = torch.tensor(draw.choice(scheduler.config.num_train_timesteps))
    rows = scheduler.add_noise(latents, noise, timesteps), timesteps, target(scheduler, latents, noise, timesteps)
    noisy, timesteps, wanted = (onto(row, pipe.device) for row in rows)
    prediction = _guided(pipe, noisy, timesteps, _guided_text(pipe, prompts, guidance), guidance=guidance)
    return F.mse_loss(prediction, wanted)
