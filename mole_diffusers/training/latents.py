"""Pictures as latents, and back: the size, the scale and the precision that a pipeline's autoencoder works in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from mole_diffusers.training.data import Samples
from mole_diffusers.training.networks import network


def latent_shape(pipe: Any, width: int | None = None, height: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the latents of pictures of this many pixels; None is the model's own size.

    Raises ValueError for a size that the pipeline cannot draw.
    """
    model, scale = network(pipe), pipe.vae_scale_factor
    multiple = max(8, scale * model.patch)
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and (pixels < 1 or pixels % multiple):
            raise ValueError(f"{name} must be a multiple of {multiple} pixels, got {pixels}")
    own = model.own_size()
    high, wide = (side if pixels is None else pixels // scale for side, pixels in zip(own, (height, width), strict=True))
    if high is None or wide is None:
        raise ValueError("the UNet names no size of its own: give the width and the height of every prompt's pictures")
    config = pipe.vae.config
    return config.z_dim if isinstance(pipe.vae, AutoencoderKLQwenImage) else config.latent_channels, high, wide


def default_side(pipe: Any) -> int:
    """The side of a pipeline's own pictures, in pixels. Raises ValueError if they are not known to be squares."""
    high, wide = network(pipe).own_size()
    if high is None or high != wide:
        raise ValueError(
            f"the pictures of this model are no squares of a known side, its own size is {high} x {wide}: give a side"
        )
    return int(high * pipe.vae_scale_factor)


@contextmanager
def precise(pipe: Any) -> Iterator[Any]:
    """The autoencoder, in fp32 while the block runs if the pipeline does so, too: that of SDXL overflows in half precision.

    Raises ValueError if gradients are needed and its weights are fp16: they would be gone before the gradient.
    """
    vae = pipe.vae
    if not (hasattr(type(pipe), "upcast_vae") and vae.config.force_upcast):
        yield vae
        return
    is_half = vae.dtype == torch.float16
    if is_half and torch.is_grad_enabled():
        raise ValueError("this autoencoder overflows in float16: train on a pipeline in float32 or bfloat16")
    try:
        with torch.autocast(vae.device.type, enabled=False):
            yield vae.to(torch.float32) if is_half else vae
    finally:
        if is_half:
            vae.to(torch.float16)


def _scale(vae: Any) -> tuple[Any, Any]:
    """(shift, factor), numbers or [C, 1, 1]: denoisers read (latents of the autoencoder - shift) * factor."""
    config = vae.config
    if isinstance(vae, AutoencoderKLQwenImage):
        mean, spread = torch.tensor([config.latents_mean, config.latents_std])[..., None, None]
        return mean, 1 / spread
    return config.shift_factor or 0.0, config.scaling_factor


@torch.no_grad()
def encode_pixels(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1 -> latents [B, C, h, w], scaled as the denoiser expects them, on the CPU."""
    with precise(pipe) as vae:
        pixels = pixels.to(pipe.device, vae.dtype)
        if isinstance(vae, AutoencoderKLQwenImage):
            latents = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]  # a video of one frame
        else:
            latents = vae.encode(pixels).latent_dist.mode()
        shift, factor = _scale(vae)
        return (latents.float().cpu() - shift) * factor


def encode(pipe: Any, images: Sequence[Image.Image], captions: Sequence[str], *, batch: int = 32) -> Samples:
    """Encode pictures with the pipeline's autoencoder, `batch` at a time, all resized to the first one's size."""
    latents, source = [], hashlib.sha256()
    for start in range(0, len(images), batch):
        chunk = [image.resize(images[0].size) for image in images[start : start + batch]]
        for image in chunk:
            source.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        latents.append(encode_pixels(pipe, pipe.image_processor.preprocess(chunk)))
    return Samples(torch.cat(latents), list(captions), source.hexdigest())


def decode(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Clean latents [B, C, H, W] -> pictures [B, 3, 8H, 8W] around -1..1, fp32, with their gradient."""
    with precise(pipe) as vae:
        if isinstance(vae, AutoencoderKLQwenImage):
            shift, factor = (each.to(latents.device, vae.dtype) for each in _scale(vae))
            return vae.decode((latents.to(vae.dtype) / factor + shift)[:, :, None]).sample[:, :, 0].float()
        shift, factor = _scale(vae)
        return vae.decode(latents.to(vae.dtype) / factor + shift).sample.float()
