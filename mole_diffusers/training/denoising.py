"""The diffusion side of training: the model's prediction, sampling with gradients, and the diffusion loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch.utils.checkpoint import checkpoint

from mole_diffusers.functional import onto
from mole_diffusers.mixture import attached
from mole_diffusers.training.data import RandomBatch, Samples, precise, token_ids

DROP = 0.1  # share of captions that `denoising_loss` empties


def check_trainable(pipe: Any) -> None:
    """Raises ValueError for a pipeline whose gates and LoRAs cannot be trained.

    It needs a UNet and a text encoder, like Stable Diffusion 1.5, 2.1 and XL.
    """
    if any(getattr(pipe, part, None) is None for part in ("unet", "text_encoder")):
        raise ValueError(f"{type(pipe).__name__} cannot be trained on: it needs a unet and a text encoder")


def training_scheduler(pipe: Any) -> DDIMScheduler:
    """The pipeline's noise schedule as DDIM, whatever its sampler. The pipeline's own scheduler keeps its state.

    Latents are clipped to -1..1, which DDIM does by default, only if the pipeline's config says so.
    """
    config = pipe.scheduler.config
    return DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))


@dataclass(frozen=True)
class EncodedText:
    """What a UNet reads of B prompts.

    Attributes:
        states: of the text encoder, [B, T, C]; in SDXL of both encoders, side by side.
        pooled: of SDXL's second encoder, [B, D]; None for other models.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None


def embed(pipe: Any, prompts: Sequence[str]) -> EncodedText:
    """Encode prompts as the pipeline does, with the gradient of its text encoders."""
    if getattr(pipe, "text_encoder_2", None) is None:
        return EncodedText(_encode(pipe, pipe.tokenizer, pipe.text_encoder, prompts)[0])
    first = _encode(pipe, pipe.tokenizer, pipe.text_encoder, prompts, output_hidden_states=True)
    second = _encode(pipe, pipe.tokenizer_2, pipe.text_encoder_2, prompts, output_hidden_states=True)
    states, pooled = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0]
    if pipe.config.force_zeros_for_empty_prompt:
        said = onto(torch.tensor([[prompt != ""] for prompt in prompts]), pipe.device)  # [B, 1]
        states, pooled = states.where(said[..., None], 0), pooled.where(said, 0)
    return EncodedText(states, pooled)


def _encode(pipe: Any, tokenizer: Any, encoder: Any, prompts: Sequence[str], **options: Any) -> Any:
    ids = token_ids(tokenizer, prompts)
    if (mixture := attached(pipe)) is not None:
        mixture.announce_text(ids)
    return encoder(onto(ids, encoder.device), **options)


def predict(pipe: Any, x: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The UNet's prediction for noisy latents x [B, C, H, W] with one prompt each, in its own parametrisation, fp32."""
    return _predict(pipe, x, timesteps, embed(pipe, prompts))


def _predict(pipe: Any, x: torch.Tensor, timesteps: torch.Tensor, text: EncodedText) -> torch.Tensor:
    added = None
    if text.pooled is not None:
        height, width = (side * pipe.vae_scale_factor for side in x.shape[2:])
        size = onto(torch.tensor([height, width, 0, 0, height, width]), x.device)  # original size, crop, target size
        added = {"text_embeds": text.pooled, "time_ids": size.to(text.pooled.dtype).expand(len(x), -1)}

    def call(x: torch.Tensor, mixture_as_now: Callable[[], None] | None = None) -> torch.Tensor:
        if mixture_as_now is not None:
            mixture_as_now()
        return pipe.unet(x.to(text.states.dtype), timesteps, text.states, added_cond_kwargs=added).sample.float()

    if torch.is_grad_enabled() and pipe.unet.is_gradient_checkpointing:
        # Gates get the noise level from the call; a block that is recomputed alone would see that of the last call.
        mixture = attached(pipe)
        return checkpoint(call, x, mixture.restore_point() if mixture else None, use_reentrant=False)
    return call(x)


def _guided(pipe: Any, prompts: Sequence[str], guidance: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`predict` with classifier-free guidance (Ho & Salimans, 2022), e_0 + guidance (e - e_0), for prompts encoded once.

    At guidance 1 there are no rows without a prompt.
    """
    text = embed(pipe, prompts if guidance == 1 else [""] * len(prompts) + list(prompts))

    def guided(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if guidance == 1:
            return _predict(pipe, x, timesteps, text)
        empty, full = _predict(pipe, torch.cat([x, x]), torch.cat([timesteps, timesteps]), text).chunk(2)
        return empty + guidance * (full - empty)

    return guided


def latent_shape(pipe: Any, width: int | None = None, height: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the latents of pictures of this many pixels; None is the UNet's own size.

    Raises ValueError for a size that the pipeline cannot draw.
    """
    config, scale = pipe.unet.config, pipe.vae_scale_factor
    own = config.sample_size if isinstance(config.sample_size, tuple | list) else (config.sample_size,) * 2
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and (pixels < 1 or pixels % max(8, scale)):
            raise ValueError(f"{name} must be a multiple of {max(8, scale)} pixels, got {pixels}")
    high, wide = (side if pixels is None else pixels // scale for side, pixels in zip(own, (height, width), strict=True))
    if high is None or wide is None:
        raise ValueError("the UNet names no size of its own: give the width and the height of every prompt's pictures")
    return config.in_channels, high, wide


def sample_ddim(
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
        guidance: classifier-free guidance; 1 runs no unconditional row.
        checkpointing: compute each step's activations again in the backward pass.
        stop: run only this many steps; None runs to the end.
    """
    scheduler = training_scheduler(pipe)
    scheduler.set_timesteps(steps)  # timesteps stay on the CPU, so that reading one does not wait for the device
    guided = _guided(pipe, prompts, guidance)

    def step(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return scheduler.step(guided(x, onto(t.expand(len(x)), x.device)), t, x).prev_sample

    for t in scheduler.timesteps[:stop]:
        x = checkpoint(step, x, t, use_reentrant=False) if checkpointing else step(x, t)
    return x


def decode(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Clean latents [B, C, H, W] -> pictures [B, 3, 8H, 8W] around -1..1, fp32, with their gradient."""
    with precise(pipe) as vae:
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float()


def target(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the model should predict according to the scheduler's config: the noise, or the velocity (Salimans & Ho,
    2022).
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction type {kind!r} cannot be trained; known: ['epsilon', 'v_prediction']")


def denoising_loss(pipe: Any, samples: Samples, batch: RandomBatch, *, guidance: float = 1.0) -> torch.Tensor:
    """The diffusion training loss on a random batch: MSE of the prediction, uniform timesteps.

    Args:
        guidance: of the prediction. 1 is the plain loss, for photos and other pictures that the conditional model should
            imitate. Some captions are then empty, so that the unconditional prediction is trained, too.
    """
    pick = batch.choice(len(samples.latents))
    dropped = batch.uniform() < (DROP if guidance == 1 else 0.0)
    prompts = ["" if gone else samples.captions[i] for i, gone in zip(pick, dropped.tolist(), strict=True)]
    latents = samples.latents[pick]
    noise, scheduler = batch.normal(*latents.shape[1:]), training_scheduler(pipe)
    timesteps = torch.tensor(batch.choice(scheduler.config.num_train_timesteps))
    rows = scheduler.add_noise(latents, noise, timesteps), timesteps, target(scheduler, latents, noise, timesteps)
    noisy, timesteps, wanted = (onto(row, pipe.device) for row in rows)
    return F.mse_loss(_guided(pipe, prompts, guidance)(noisy, timesteps), wanted)
