"""A LoRA in training on a pipeline's own models, and the same as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from torch import nn

from mole_diffusers.patching import peft_injection
from mole_diffusers.training.beam import Ranks, importance

CONCEPT = "concept"
LAYERS = {  # module names, as regular expressions, by what a LoRA may cover
    "attention": r".*(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)",
    "feed-forward": r".*(ff\.net\.(0\.proj|2)|mlp\.fc[12])",
    "convolution": r".*(resnets\.\d+\.conv[12]|proj_in|proj_out)",
}


@dataclass
class LoraLayers:
    """The layers of a LoRA in training, by "PART.NAME".

    Attributes:
        modules: peft's layers.
        logits: g [r] of each layer whose ranks compete; empty where none do. See `beam`.
        tau: their temperature.
    """

    modules: dict[str, Any]
    logits: dict[str, nn.Parameter]
    tau: float

    def ranks(self) -> dict[str, Ranks]:
        """The layers whose ranks compete."""
        return {
            name: Ranks(logits, self.modules[name].lora_A[CONCEPT].weight, self.modules[name].lora_B[CONCEPT].weight)
            for name, logits in self.logits.items()
        }

    def weights(self, part: str) -> list[nn.Parameter]:
        """down and up of every layer of a part."""
        return [h for n in self.modules if n.startswith(f"{part}.") for h in (self._down(n), self._up(n))]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Diffusers' keys -> fp32 on the CPU, "unet.<layer>.lora_A.weight" say, with pi folded into the downs."""
        found: dict[str, torch.Tensor] = {}
        for name in self.modules:
            down, up = (half.detach().float().cpu().clone() for half in (self._down(name), self._up(name)))
            if name in self.logits:
                pi = importance(self.logits[name].detach().float().cpu(), self.tau)
                down = down * pi.reshape(-1, *(1,) * (down.dim() - 1))
            found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Start from an earlier LoRA of the same layers and rank.

        Raises ValueError where its layers or sizes are others.
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
        """Everything that moves, for a checkpoint."""
        return {name: p.detach().cpu().clone() for name, p in self._moving().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """What `state_dict` gave."""
        for name, parameter in self._moving().items():
            parameter.copy_(state[name])

    def _moving(self) -> dict[str, nn.Parameter]:
        halves = {f"{n}.down": self._down(n) for n in self.modules} | {f"{n}.up": self._up(n) for n in self.modules}
        return halves | {f"{n}.g": logits for n, logits in self.logits.items()}

    def _down(self, name: str) -> nn.Parameter:
        return self.modules[name].lora_A[CONCEPT].weight

    def _up(self, name: str) -> nn.Parameter:
        return self.modules[name].lora_B[CONCEPT].weight


def lora_layers(
    pipe: Any, parts: list[str], undo: ExitStack, *, layers: tuple[str, ...], rank: int, alpha: float, tau: float, beam: bool
) -> LoraLayers:
    """Put a new LoRA on `parts` of a pipeline; random downs follow torch's CPU seed, ups are zero.

    `undo` takes it off again, so that the models are as they were.
    """
    modules: dict[str, Any] = {}
    for part in parts:
        model = getattr(pipe, part)
        pattern = "|".join(LAYERS[kind] for kind in layers)
        peft_injection.inject_trainable(model, CONCEPT, undo, pattern=pattern, rank=rank, alpha=alpha)
        cast_training_params(model)  # fp32 on a half base, too: its steps would be lost in rounding
        found = {n: m for n, m in model.named_modules() if CONCEPT in getattr(m, "lora_A", {})}
        modules |= {f"{part}.{name}": module for name, module in found.items()}
    logits = {name: _competing(module.lora_A[CONCEPT], tau, undo) for name, module in modules.items()} if beam else {}
    return LoraLayers(modules, logits, tau)


def _competing(down: nn.Module, tau: float, undo: ExitStack) -> nn.Parameter:
    """Have pi multiply what `down` gives; returns g [r], zero."""
    weight: Any = down.weight
    logits = nn.Parameter(torch.zeros(weight.shape[0], device=weight.device))
    undo.callback(down.register_forward_hook(_times(logits, tau)).remove)
    return logits


def _times(logits: nn.Parameter, tau: float) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
    def scaled(_: nn.Module, __: tuple, z: torch.Tensor) -> torch.Tensor:
        pi = importance(logits, tau).to(z.dtype)  # [r]
        return z * (pi[:, None, None] if z.dim() == 4 else pi)  # [B, T, r] or [B, r, H, W]

    return scaled
