"""The LoRA in training: put on a pipeline's own models, read out as tensors, written to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from torch import nn

from mole_diffusers.lora import PEFT_METADATA, family_of
from mole_diffusers.lora.writing import save_atomically
from mole_diffusers.patching import peft_injection
from mole_diffusers.patching.undo import Undo
from mole_diffusers.training.beam import Ranks, importance
from mole_diffusers.training.config import LoraTraining

CONCEPT = "concept"  # the adapter's name
ARCHITECTURES = {  # ModelSpec's words
    "SD 1.x": "stable-diffusion-v1/lora",
    "SD 2.x": "stable-diffusion-v2-768-v/lora",
    "SDXL": "stable-diffusion-xl-v1-base/lora",
}
LAYERS = {  # of config.LORA_LAYERS -> module names, as a regular expression
    "attention": r".*(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)",
    "feed-forward": r".*(ff\.net\.(0\.proj|2)|mlp\.fc[12])",
    "convolution": r".*(resnets\.\d+\.conv[12]|proj_in|proj_out)",
}


@dataclass
class LoraLayers:
    """The layers of a LoRA in training, by name: "unet.down_blocks.0...".

    Attributes:
        modules: peft's layers.
        logits: g [r] of each layer whose ranks compete; empty where none do. See `beam`.
        temperature: of their softmax.
    """

    modules: dict[str, Any]
    logits: dict[str, nn.Parameter]
    temperature: float

    def ranks(self) -> dict[str, Ranks]:
        """The layers whose ranks compete."""
        return {
            name: Ranks(logits, self.modules[name].lora_A[CONCEPT].weight, self.modules[name].lora_B[CONCEPT].weight)
            for name, logits in self.logits.items()
        }

    def weights(self, part: str) -> list[nn.Parameter]:
        """down and up of every layer of a component."""
        return [h for n in self.modules if n.startswith(f"{part}.") for h in (self._down(n), self._up(n))]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Diffusers' keys -> fp32 on the CPU, "unet.<layer>.lora_A.weight" say, with pi folded into the downs."""
        found: dict[str, torch.Tensor] = {}
        for name in self.modules:
            down, up = (half.detach().float().cpu().clone() for half in (self._down(name), self._up(name)))
            if name in self.logits:
                pi = importance(self.logits[name].detach().float().cpu(), self.temperature)
                down = down * pi.reshape(-1, *(1,) * (down.dim() - 1))
            found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Start from an earlier LoRA of the same layers and rank.

        Raises ValueError for other layers or sizes.
        """
        wanted = {f"{n}.lora_A.weight": self._down(n) for n in self.modules}
        wanted |= {f"{n}.lora_B.weight": self._up(n) for n in self.modules}
        if odd := sorted(set(wanted) ^ set(tensors)):
            raise ValueError(f"the LoRA to start from has other layers: {odd[0]} is in one of the two only")
        for key, parameter in wanted.items():
            if tensors[key].shape != parameter.shape:
                raise ValueError(
                    f"the LoRA to start from has {list(tensors[key].shape)} at {key}, not {list(parameter.shape)}"
                )
            parameter.copy_(tensors[key])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that is trained, for a checkpoint."""
        return {name: p.detach().cpu().clone() for name, p in self._trained().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set it to what `state_dict` returned."""
        for name, parameter in self._trained().items():
            parameter.copy_(state[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        halves = {f"{n}.down": self._down(n) for n in self.modules} | {f"{n}.up": self._up(n) for n in self.modules}
        return halves | {f"{n}.g": logits for n, logits in self.logits.items()}

    def _down(self, name: str) -> nn.Parameter:
        return self.modules[name].lora_A[CONCEPT].weight

    def _up(self, name: str) -> nn.Parameter:
        return self.modules[name].lora_B[CONCEPT].weight


def add_lora(pipe: Any, config: LoraTraining, undo: Undo) -> LoraLayers:
    """Put a new LoRA on the components that `config` trains; random downs follow torch's CPU seed, ups are zero.

    `undo` takes it off again, so that the models are as they were.
    """
    modules: dict[str, Any] = {}
    pattern = "|".join(LAYERS[kind] for kind in config.layers)
    for part in config.rates:
        model = getattr(pipe, part)
        peft_injection.inject_trainable(model, CONCEPT, undo, pattern=pattern, rank=config.rank, alpha=config.alpha)
        cast_training_params(model)  # fp32 also on a half base: small steps would be lost in rounding
        found = {n: m for n, m in model.named_modules() if CONCEPT in getattr(m, "lora_A", {})}
        modules |= {f"{part}.{name}": module for name, module in found.items()}
    logits: dict[str, nn.Parameter] = {}
    if config.beam:
        logits = {n: _competing(module.lora_A[CONCEPT], config.temperature, undo) for n, module in modules.items()}
    return LoraLayers(modules, logits, config.temperature)


def _competing(down: nn.Module, temperature: float, undo: Undo) -> nn.Parameter:
    """Multiply the output of `down` by the ranks' importance pi; returns its logits g [r], zero."""
    weight: Any = down.weight
    logits = nn.Parameter(torch.zeros(weight.shape[0], device=weight.device))

    def scaled(_: nn.Module, __: tuple, z: torch.Tensor) -> torch.Tensor:
        pi = importance(logits, temperature).to(z.dtype)  # [r]
        return z * (pi[:, None, None] if z.dim() == 4 else pi)  # [B, T, r] or [B, r, H, W]

    undo.after_forward(down, scaled)
    return logits


# ---- files


def header(pipe: Any, *, title: str, rank: int, alpha: float, pictures: int) -> dict[str, str]:
    """ModelSpec and kohya metadata for the file of a LoRA that was trained on `pipe`; every value is a string."""
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
    """Write a LoRA that diffusers and `read_expert` load, with alpha, trigger words and `about` in the header."""
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
    two_encoders: bool = False,
) -> None:
    """Write the same LoRA with kohya/A1111 keys and an alpha for every layer; other tools load it, and so does diffusers.

    Args:
        two_encoders: whether the base has two text encoders, as Stable Diffusion XL; it is the first that is trained.
    """
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_" if two_encoders else "lora_te_text_model_"}
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
