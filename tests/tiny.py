"""A complete tiny Stable Diffusion and tiny LoRA files, made without downloads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mole_diffusers import models_of

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "fc1", "fc2")
CONVOLUTION = ("conv1", "conv2", "proj_in", "proj_out", "time_emb_proj")


def tiny_pipeline(seed: int = 0, *, width: int = 16) -> StableDiffusionPipeline:
    """A Stable Diffusion of the real classes, with under 200k random parameters. It draws 32 x 32 pictures."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=32,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(width // 2, width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_tokenizer() -> CLIPTokenizer:
    """A tokenizer of single letters, for texts of up to 16 tokens."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


def tiny_clip(seed: int = 0) -> CLIPModel:
    """A CLIP with random weights for 32 x 32 pictures. Its tokenizer is `tiny_tokenizer`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {"image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=size | ends | text, vision_config=size | vision, projection_dim=8)).eval()


def lora_layers(pipe: Any, ends: Iterable[str] = ATTENTION) -> dict[str, Any]:
    """{"PART.NAME": module} for every linear and convolution layer whose name ends with one of `ends`, and that takes
    a LoRA."""
    return {
        f"{part}.{name}": module
        for part, model in models_of(pipe).items()
        for name, module in model.named_modules()
        if name.endswith(tuple(ends)) and isinstance(module, nn.Linear | nn.Conv2d) and ".experts." not in name
    }


def tiny_lora(
    pipe: Any, path: Path, *, rank: int = 4, seed: int = 0, ends: Iterable[str] = ATTENTION, size: float = 0.5
) -> Path:
    """Write a random LoRA with a visible effect, in diffusers' own keys, for the layers of `lora_layers`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in lora_layers(pipe, ends).items():
        shape = module.weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator) * size / shape[1:].numel() ** 0.5
        up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * size
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    save_file(tensors, path, {"format": "pt"})
    return path
