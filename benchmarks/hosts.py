"""Pipelines of published sizes with random weights, for measuring; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mole_diffusers.testing import tiny_pipeline, tiny_tokenizer

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def random_weights(build: Callable[[], nn.Module], dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """The module that `build` makes, with the spread of PyTorch's own initialisation, made where and as it is used."""
    with init_empty_weights():
        module = build()
    generator = torch.Generator(device).manual_seed(seed)
    for name, empty in list(module.named_parameters()):
        if empty.dim() < 2:
            value = torch.full(empty.shape, float(name.endswith("weight")), device=device, dtype=dtype)
        else:
            value = torch.randn(empty.shape, generator=generator, device=device, dtype=dtype)
            value *= (3 * empty[0].numel()) ** -0.5
        set_module_tensor_to_device(module, name, device, value=value, dtype=dtype)
    return module.to(device).eval()


def _text(width: int, layers: int, heads: int, *, projected: int = 0) -> nn.Module:
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(CLIPTextConfig(**shape, num_attention_heads=heads, projection_dim=projected or 512))


def _vae() -> nn.Module:
    """Eight pixels to a latent as in the real one, and narrow: no step of the denoiser runs it."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=down, up_block_types=up, norm_num_groups=2)


def _tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def _stable_diffusion(unet: nn.Module, text_encoder: nn.Module, vae: nn.Module, tokenizer: Any) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        unet=unet,
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd15(dtype: torch.dtype, device: str = "cpu") -> StableDiffusionPipeline:
    """SD 1.5's UNet (859.5 M) and text encoder from their published configurations."""
    unet = random_weights(lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768), dtype, device)
    text_encoder = random_weights(lambda: _text(768, 12, 12), dtype, device)
    return _stable_diffusion(unet, text_encoder, random_weights(_vae, dtype, device), _tokenizer())


def sdxl(dtype: torch.dtype, device: str = "cpu") -> StableDiffusionXLPipeline:
    """SDXL's UNet (2.57 B) and text encoders from their published configurations."""
    pipe = StableDiffusionXLPipeline(
        unet=random_weights(lambda: UNet2DConditionModel(sample_size=128, cross_attention_dim=2048, **XL), dtype, device),
        text_encoder=random_weights(lambda: _text(768, 12, 12), dtype, device),
        text_encoder_2=random_weights(lambda: _text(1280, 32, 20, projected=1280), dtype, device),
        vae=random_weights(_vae, dtype, device),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def thin(dtype: torch.dtype, device: str = "cpu") -> StableDiffusionPipeline:
    """SD 1.5's UNet, module for module, so narrow that a step is nearly all dispatch: what a GPU's host thread does."""
    heads = {"norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8}
    unet = random_weights(
        lambda: UNet2DConditionModel(sample_size=64, block_out_channels=(8, 16, 24, 24), **heads), dtype, device
    )
    text_encoder = random_weights(lambda: _text(8, 2, 2), dtype, device)
    return _stable_diffusion(unet, text_encoder, random_weights(_vae, dtype, device), tiny_tokenizer())


def _tiny(dtype: torch.dtype, device: str = "cpu") -> StableDiffusionPipeline:
    return tiny_pipeline().to(device, dtype)


@dataclass(frozen=True)
class Size:
    """A pipeline to measure on: how to make it, its usual side in pixels, and pixels to a latent."""

    build: Callable[..., Any]
    pixels: int
    factor: int = 8


SIZES: Mapping[str, Size] = {
    "tiny": Size(_tiny, 32, 2),
    "thin": Size(thin, 64),
    "sd15": Size(sd15, 512),
    "sdxl": Size(sdxl, 1024),
}


def inputs(pipe: Any, size: str, *, pixels: int, batch: int = 2) -> dict[str, Any]:
    """What the denoiser is called with in a step of guided sampling (a batch of 2), random."""
    unet, generator = pipe.unet, torch.Generator(pipe.device).manual_seed(1)
    like = {"generator": generator, "device": pipe.device, "dtype": unet.dtype}
    side, tokens = pixels // SIZES[size].factor, pipe.tokenizer.model_max_length
    given: dict[str, Any] = {
        "sample": torch.randn(batch, unet.config.in_channels, side, side, **like),
        "timestep": torch.tensor(500, device=pipe.device),
        "encoder_hidden_states": torch.randn(batch, tokens, unet.config.cross_attention_dim, **like),
        "return_dict": False,
    }
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * batch, device=pipe.device, dtype=unet.dtype)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 1280, **like), "time_ids": sizes}
    return given


def lora_files(unet: nn.Module, folder: Path, count: int, *, rank: int) -> dict[str, Path]:
    """Write `count` random LoRAs of all attention layers of a UNet, in its dtype and in diffusers' own keys."""
    files = {}
    for index in range(count):
        tensors, generator = {}, torch.Generator().manual_seed(index)
        for name, module in unet.named_modules():
            if name.endswith(ATTENTION) and isinstance(module, nn.Linear):
                (out, inside), dtype = module.weight.shape, module.weight.dtype
                for half, shape in (("A", (rank, inside)), ("B", (out, rank))):
                    random = torch.randn(shape, generator=generator) * 0.1 * shape[1] ** -0.5
                    tensors[f"unet.{name}.lora_{half}.weight"] = random.to(dtype)
        files[f"lora{index}"] = folder / f"lora{index}.safetensors"
        save_file(tensors, files[f"lora{index}"], {"format": "pt"})
    return files
