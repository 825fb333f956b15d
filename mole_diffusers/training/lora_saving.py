"""A trained LoRA -> a file that diffusers, kohya-format tools and `read_expert` load, and what its header says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mole_diffusers.lora import PEFT_METADATA, family_of
from mole_diffusers.lora.writing import save_atomically

ARCHITECTURES = {"SD 1.x": "stable-diffusion-v1/lora", "SD 2.x": "stable-diffusion-v2-768-v/lora"}  # ModelSpec's words


def header(pipe: Any, *, title: str, rank: int, alpha: float, pictures: int) -> dict[str, str]:
    """ModelSpec's and kohya's words for the header of a LoRA that was trained on `pipe`; every value is a string."""
    family = family_of({"unet": pipe.unet})
    about = {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "diffusers", "modelspec.title": title}
    about |= {"modelspec.architecture": ARCHITECTURES[family]} if family in ARCHITECTURES else {}
    about |= {"ss_output_name": title, "ss_network_module": "networks.lora", "ss_num_train_images": str(pictures)}
    return about | {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha), "ss_v2": str(family == "SD 2.x")}


def save_lora(
    tensors: Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    alpha: float,
    rank: int,
    triggers: str = "",
    about: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a LoRA with diffusers' keys, alpha in the header, trigger words, and what else `about` says there."""
    parts = sorted({key.split(".")[0] for key in tensors})
    peft = {f"{p}.{k}": v for p in parts for k, v in {"r": rank, "lora_alpha": alpha, "peft_type": "LORA"}.items()}
    targets = {
        p: sorted({k.removeprefix(f"{p}.").split(".lora_")[0] for k in tensors if k.startswith(f"{p}.")}) for p in parts
    }
    peft |= {f"{p}.target_modules": names for p, names in targets.items()}
    _save(tensors, path, {**(about or {}), PEFT_METADATA: json.dumps(peft)}, triggers=triggers, dtype=dtype)


def save_kohya(
    tensors: Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    alpha: float,
    triggers: str = "",
    about: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the same LoRA with kohya/A1111 keys and an alpha for every layer."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        layer, _, half = rest.removeprefix("text_model.").rpartition(".lora_")
        stem = prefixes[part] + layer.replace(".", "_")
        renamed[f"{stem}.{'lora_down' if half[0] == 'A' else 'lora_up'}.weight"] = tensor
        renamed[f"{stem}.alpha"] = torch.tensor(alpha)
    _save(renamed, path, about or {}, triggers=triggers, dtype=dtype)


def _save(
    tensors: Mapping[str, torch.Tensor], path: str | Path, about: Mapping[str, str], *, triggers: str, dtype: torch.dtype
) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **about, "modelspec.trigger_phrase": triggers}
    save_atomically({k: v.to(dtype).contiguous() for k, v in tensors.items()}, path, metadata)
