"""Concept LoRAs: train one low-rank adapter on UNet and text encoder from pictures, save an ordinary LoRA file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from mole_diffusers import carrier
from mole_diffusers.training.data import Draw, Samples
from mole_diffusers.training.denoising import denoising_loss

CONCEPT = "concept"
LAYERS = {  # module names, as regular expressions, by what a LoRA may cover
    "attention": r".*(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)",
    "feed-forward": r".*(ff\.net\.(0\.proj|2)|mlp\.fc[12])",
    "convolution": r".*(resnets\.\d+\.conv[12]|proj_in|proj_out)",
}


@dataclass(frozen=True)
class ConceptConfig:
    """How one concept is taught.

    Attributes:
        rank: rank of every layer, 1 or more.
        alpha: the scale is alpha / rank.
        layers: which of "attention", "feed-forward", "convolution".
        steps: updates.
        batch: pictures per update.
        lr: AdamW's peak rate; cosine down to a tenth.
        text_lr: the same for the text encoder; 0 leaves it out.
        autocast: dtype of the forward pass; None trains in the model's own.
    """

    rank: int = 8
    alpha: float = 8.0
    layers: tuple[str, ...] = ("attention",)
    steps: int = 300
    batch: int = 16
    lr: float = 1e-3
    text_lr: float = 5e-4
    seed: int = 0
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 1 or self.batch < 1:
            raise ValueError(f"rank, steps and batch must be 1 or more, got {self.rank}, {self.steps}, {self.batch}")
        if not self.layers or (unknown := set(self.layers) - set(LAYERS)):
            raise ValueError(f"unknown layers {sorted(unknown) if self.layers else []}; known: {list(LAYERS)}")


def train_lora(
    pipe: Any, samples: Samples, config: ConceptConfig, *, init: Mapping[str, torch.Tensor] | None = None, name: str = ""
) -> dict[str, torch.Tensor]:
    """Train a LoRA on `samples`; the pipeline is given back as it was.

    Args:
        init: tensors of an earlier LoRA to start from, of the same layers and rank.
        name: shown beside the progress bar.

    Returns:
        Tensors with diffusers' keys ("unet.<layer>.lora_A.weight", ...), for `save_lora`.
    """
    torch.manual_seed(config.seed)
    pattern = "|".join(LAYERS[kind] for kind in config.layers)
    parts = {"unet": config.lr, "text_encoder": config.text_lr}
    with ExitStack() as undo:
        groups = []
        for part, lr in parts.items():
            if lr:
                model = getattr(pipe, part)
                carrier.inject_trainable(model, CONCEPT, undo, pattern=pattern, rank=config.rank, alpha=config.alpha)
                if init is not None:
                    _load(model, part, init)
                groups.append({"params": [p for p in model.parameters() if p.requires_grad], "lr": lr})
        _fit(pipe, samples, config, groups=groups, name=name)
        return {k: v for part, lr in parts.items() if lr for k, v in _tensors(getattr(pipe, part), part).items()}


def _fit(pipe: Any, samples: Samples, config: ConceptConfig, *, groups: list[dict], name: str) -> None:
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.55 + 0.45 * math.cos(math.pi * i / config.steps))
    generator = torch.Generator().manual_seed(config.seed)
    device = pipe.device.type
    bar = tqdm(range(config.steps), desc=name or "concept", mininterval=5)
    for _ in bar:
        with torch.autocast(device, config.autocast, enabled=config.autocast is not None):
            loss = denoising_loss(pipe, samples, Draw(generator, config.batch))
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        cosine.step()
        optimizer.zero_grad(set_to_none=True)
        if bar.n % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def _each(model: nn.Module) -> Mapping[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if CONCEPT in getattr(m, "lora_A", {})}


def _tensors(model: nn.Module, part: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, module in _each(model).items():
        for half in ("lora_A", "lora_B"):
            tensors[f"{part}.{name}.{half}.weight"] = getattr(module, half)[CONCEPT].weight.detach().float().cpu().clone()
    return tensors


@torch.no_grad()
def _load(model: nn.Module, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, module in _each(model).items():
        for half in ("lora_A", "lora_B"):
            getattr(module, half)[CONCEPT].weight.copy_(tensors[f"{part}.{name}.{half}.weight"])


def save_lora(
    tensors: Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    alpha: float,
    rank: int,
    triggers: str = "",
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a LoRA that diffusers, and `read_expert`, load: diffusers' keys, alpha in the header, trigger words."""
    parts = sorted({key.split(".")[0] for key in tensors})
    peft = {f"{p}.{k}": v for p in parts for k, v in {"r": rank, "lora_alpha": alpha, "peft_type": "LORA"}.items()}
    targets = {
        p: sorted({k.removeprefix(f"{p}.").split(".lora_")[0] for k in tensors if k.startswith(f"{p}.")}) for p in parts
    }
    peft |= {f"{p}.target_modules": names for p, names in targets.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(peft), "modelspec.trigger_phrase": triggers}
    _save(tensors, path, metadata, dtype)


def save_kohya(
    tensors: Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    alpha: float,
    triggers: str = "",
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the same LoRA with kohya/A1111 keys and an alpha for every layer."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        layer, _, half = rest.rpartition(".lora_")
        stem = prefixes[part] + layer.replace(".", "_")
        renamed[f"{stem}.{'lora_down' if half[0] == 'A' else 'lora_up'}.weight"] = tensor
        renamed[f"{stem}.alpha"] = torch.tensor(alpha)
    _save(renamed, path, {"format": "pt", "modelspec.trigger_phrase": triggers}, dtype)


def _save(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: dict[str, str], dtype: torch.dtype) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(dtype).contiguous() for k, v in tensors.items()}, path, metadata)
