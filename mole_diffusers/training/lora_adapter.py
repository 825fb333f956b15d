"""A LoRA in training: put it on a pipeline's models, read it out as tensors, write it to a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.training_utils import cast_training_params
from torch import nn

from mole_diffusers.lora import LoraWeights, family_of
from mole_diffusers.lora.writing import TRIGGERS, write_lora
from mole_diffusers.patching.install import peft_injection
from mole_diffusers.patching.undo import Undo, undoing
from mole_diffusers.training.beam import Ranks, importance
from mole_diffusers.training.config import LORA_LAYERS, LoraTraining

CONCEPT = "concept"  # the adapter's name
MODELSPEC_ARCHITECTURES = {  # ModelSpec's words
    "SD 1.x": "stable-diffusion-v1/lora",
    "SD 2.x": "stable-diffusion-v2-768-v/lora",
    "SDXL": "stable-diffusion-xl-v1-base/lora",
}


@dataclass
class LoraLayers:
    """A LoRA in training, by the names of its layers: "unet.down_blocks.0...".

    Attributes:
        halves: down and up of every layer by diffusers' keys: "unet.<layer>.lora_A.weight".
        logits: g [r] of each layer whose ranks compete; empty if none do. See `beam`.
        temperature: of their softmax.
    """

    halves: dict[str, nn.Parameter]
    logits: dict[str, nn.Parameter]
    temperature: float

    def ranks(self) -> dict[str, Ranks]:
        """The layers whose ranks compete."""
        pairs = {n: [self.halves[f"{n}.lora_{half}.weight"] for half in "AB"] for n in self.logits}
        return {name: Ranks(self.logits[name], *pair) for name, pair in pairs.items()}

    def groups(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, by the learning rate of each component; logits do not decay."""
        groups = []
        for part, lr in rates.items():
            for parameters, decay in ((self.halves, 1e-2), (self.logits, 0.0)):
                own = [parameter for name, parameter in parameters.items() if name.startswith(f"{part}.")]
                groups += [{"params": own, "lr": lr, "weight_decay": decay}] if own else []
        return groups

    def tensors(self) -> dict[str, torch.Tensor]:
        """`halves` in fp32 on the CPU, with pi folded into the downs."""
        found = {key: half.detach().float().cpu().clone() for key, half in self.halves.items()}
        for name, logits in self.logits.items():
            down = found[f"{name}.lora_A.weight"]
            down *= importance(logits.detach().float().cpu(), self.temperature).reshape(-1, *(1,) * (down.dim() - 1))
        return found

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All trained parameters, for a checkpoint."""
        return {name: p.detach().cpu().clone() for name, p in self._trained().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, parameter in self._trained().items():
            parameter.copy_(state[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        return self.halves | {f"{name}.g": logits for name, logits in self.logits.items()}


@contextmanager
def new_lora(pipe: Any, config: LoraTraining) -> Iterator[LoraLayers]:
    """A new LoRA on a pipeline while the block runs, to train it in a loop of your own. Then the models are as they were."""
    with undoing() as undo:
        yield add_lora(pipe, config, undo)


def add_lora(pipe: Any, config: LoraTraining, undo: Undo) -> LoraLayers:
    """Put a new LoRA on the components that `config` trains. Random downs follow torch's CPU seed; ups are zero.

    `undo` takes it off again and leaves the models as they were.
    """
    lora = LoraLayers({}, {}, config.temperature)
    pattern = "|".join(LORA_LAYERS[kind] for kind in config.layers)
    for part in config.rates:
        model = getattr(pipe, part)
        peft_injection.inject_trainable(model, CONCEPT, undo, pattern=pattern, rank=config.rank, alpha=config.alpha)
        cast_training_params(model)  # fp32 also on a half base: small steps would be lost in rounding
        for name, module in model.named_modules():
            if CONCEPT in getattr(module, "lora_A", {}):
                lora.halves[f"{part}.{name}.lora_A.weight"] = module.lora_A[CONCEPT].weight
                lora.halves[f"{part}.{name}.lora_B.weight"] = module.lora_B[CONCEPT].weight
                if config.beam:
                    lora.logits[f"{part}.{name}"] = _competing(module.lora_A[CONCEPT], config.temperature, undo)
    return lora


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
    about |= {"modelspec.architecture": MODELSPEC_ARCHITECTURES[family]} if family in MODELSPEC_ARCHITECTURES else {}
    about |= {"ss_output_name": title, "ss_network_module": "networks.lora", "ss_num_train_images": str(pictures)}
    return about | {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha), "ss_v2": str(family == "SD 2.x")}


def save_lora(
    tensors: Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    alpha: float,
    triggers: str = "",
    about: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
    format: Literal["diffusers", "kohya"] = "diffusers",
) -> None:
    """Write a LoRA that diffusers and `read_expert` load. Trigger words and `about` go into the header.

    Args:
        format: "diffusers" has alpha folded in; "kohya" has the keys of kohya and A1111, and an alpha for every layer.
    """
    metadata = {**(about or {}), TRIGGERS: triggers}
    write_lora(_by_layer(tensors, alpha), path, format=format, alphas=format == "kohya", dtype=dtype, metadata=metadata)


def _by_layer(tensors: Mapping[str, torch.Tensor], alpha: float) -> dict[str, dict[str, LoraWeights]]:
    found: dict[str, dict[str, LoraWeights]] = {}
    for key, down in tensors.items():
        name, _, half = key.rpartition(".lora_")
        if half == "A.weight":
            part, _, layer = name.partition(".")
            weights = LoraWeights(down, tensors[f"{name}.lora_B.weight"], alpha / len(down))
            found.setdefault(part, {})[layer.removeprefix("text_model.")] = weights
    return found
