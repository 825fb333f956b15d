"""Pipelines of published sizes with random weights, to measure on. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny import tiny_pipeline, tiny_tokenizer

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
THIN = SD15 | {
    "block_out_channels": (8, 16, 24, 24),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}
XL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
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


def random_weights(build: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> Any:
    """The module that `build` makes, initialised by its classes on this device and in this dtype; the same every time."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build().eval()
    finally:
        torch.set_default_dtype(before)


def _text(width: int, layers: int, heads: int, projected: int = 0) -> nn.Module:
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(CLIPTextConfig(**shape, num_attention_heads=heads, projection_dim=projected or 512))


def _vae() -> nn.Module:
    """A VAE with eight pixels per latent, like the real one. It is narrow, since a denoiser step does not run it."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=down, up_block_types=up, norm_num_groups=2)


@dataclass(frozen=True)
class Size:
    """A pipeline to measure on.

    Attributes:
        pixels: the usual side of its pictures.
        unet: the UNet's configuration; if it is empty, the pipeline is the tests' tiny one.
        texts: width, layers and heads of one or two text encoders, and the projection size of the second.
        tokens: the number of tokens of a text.
    """

    pixels: int
    unet: Mapping[str, Any] = field(default_factory=dict)
    texts: Sequence[tuple[int, ...]] = ()
    tokens: int = 77

    def build(self, dtype: torch.dtype, device: str = "cpu") -> Any:
        """A new pipeline."""
        if not self.unet:
            return tiny_pipeline().to(device, dtype)
        made = partial(random_weights, dtype=dtype, device=device)
        parts = {"unet": made(lambda: UNet2DConditionModel(**self.unet)), "vae": made(_vae)}
        for end, text in zip(("", "_2"), self.texts, strict=False):
            parts |= {f"text_encoder{end}": made(partial(_text, *text)), f"tokenizer{end}": tiny_tokenizer()}
            parts[f"tokenizer{end}"].model_max_length = self.tokens
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
        if len(self.texts) > 1:
            pipe = StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
        else:
            unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipe = StableDiffusionPipeline(**parts, scheduler=scheduler, **unchecked)
        pipe.set_progress_bar_config(disable=True)
        return pipe


SIZES = {
    "tiny": Size(32),
    # all modules of SD 1.5's UNet, so narrow that a step is nearly all dispatch: the work of a GPU's host thread
    "thin": Size(64, THIN, [(8, 2, 2)], tokens=16),
    # UNets (859.5 M and 2.57 B) and text encoders as published
    "sd15": Size(512, SD15, [(768, 12, 12)]),
    "sdxl": Size(1024, XL, [(768, 12, 12), (1280, 32, 20, 1280)]),
}


def inputs(pipe: Any, *, pixels: int, pictures: int = 1) -> dict[str, Any]:
    """Random arguments of the denoiser's call in a step of guided sampling, in which each picture is there twice."""
    unet, generator = pipe.unet, torch.Generator(pipe.device).manual_seed(1)
    like = {"generator": generator, "device": pipe.device, "dtype": unet.dtype}
    side, tokens = pixels // pipe.vae_scale_factor, pipe.tokenizer.model_max_length
    given: dict[str, Any] = {
        "sample": torch.randn(pictures, unet.config.in_channels, side, side, **like).repeat(2, 1, 1, 1),
        "timestep": torch.tensor(500, device=pipe.device),
        "encoder_hidden_states": torch.randn(2 * pictures, tokens, unet.config.cross_attention_dim, **like),
        "return_dict": False,
    }
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * 2 * pictures, device=pipe.device, dtype=unet.dtype)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(2 * pictures, 1280, **like), "time_ids": sizes}
    return given


def lora_files(unet: nn.Module, folder: Path, count: int, *, rank: int) -> dict[str, Path]:
    """Write `count` random LoRAs for all attention layers of a UNet, in its dtype and in diffusers' own keys."""
    layers = {name: m.weight for name, m in unet.named_modules() if isinstance(m, nn.Linear) and name.endswith(ATTENTION)}
    files = {f"lora{i}": folder / f"lora{i}.safetensors" for i in range(count)}
    for seed, path in enumerate(files.values()):
        tensors, generator = {}, torch.Generator().manual_seed(seed)
        for name, weight in layers.items():
            for half, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                random = torch.randn(shape, generator=generator) * 0.1 * shape[1] ** -0.5
                tensors[f"unet.{name}.lora_{half}.weight"] = random.to(weight.dtype)
        save_file(tensors, path, {"format": "pt"})
    return files
