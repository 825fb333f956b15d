"""How experts ride in a model: as one peft adapter whose rank space the gates scale. The only file that touches peft.

peft calls a `LoraVariant` instead of its own LoRA arithmetic; that keeps `disable_lora`, the `scale` argument, other
adapters, quantised layers and hooks of the host working. The extension point is private to peft.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from mole_diffusers import mixing
from mole_diffusers.experts import Stack
from mole_diffusers.gates import Layer
from mole_diffusers.processor import Present, Slot

ADAPTER = "mole_experts"


class GatedLora:
    """The arithmetic of one layer: result + up (g[segment] * (down x)) for all experts in one pass."""

    def __init__(self, slot: Slot, present: Present, layer: str):
        self.slot, self.present, self.layer = slot, present, layer

    def forward(
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """x [B, Cin], [B, T, Cin] or [B, Cin, H, W]; result alike with Cout."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        z = down(x)  # [B, R], [B, T, R] or [B, R, H, W]
        weights = self.slot.read(self.present, x, Layer(self.layer, z, up.weight, down.segment))
        z = z * mixing.over_ranks(weights, None if self.slot.gate.ranked else down.segment, z)
        return result + up(z) * module.scaling[active_adapter]

    def supports_lora_conversion(self) -> bool:
        return False

    def merge_safe(self, *_: object) -> None:
        raise ValueError("gated experts cannot be merged into the weights as they are")

    merge_unsafe = unmerge = merge_safe


def inject(model: Any, stacks: Mapping[str, Stack], slots: Mapping[str, Slot], undo: ExitStack) -> None:
    """Put the stacked experts on the named layers of `model`; every change's undoing is recorded in `undo` first."""
    before, active = _record(model, ADAPTER, undo)
    targets = "|".join(re.escape(name) for name in stacks)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)
    model._hf_peft_config_loaded = True
    for name, stack in stacks.items():
        _fill(model.get_submodule(name), stack, GatedLora(slots[name], stack.present, f"{slots[name].part}.{name}"))
        if isinstance(model.get_submodule(name.rpartition(".")[0]), AnimateDiffTransformer3D):
            hook = model.get_submodule(name).register_forward_pre_hook(_by_position, with_kwargs=True)
            undo.callback(hook.remove)
    _activate(model, {name: [*active.get(name, []), ADAPTER] for name in (*active, *stacks)})
    for p, flag in before.items():  # peft froze the host; whether its own parameters train is the user's choice
        p.requires_grad_(flag)


def _by_position(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """AnimateDiff's motion modules hand their projections `input` by name; peft's layers have another name for it."""
    return ((kwargs["input"],), {}) if "input" in kwargs else None


def inject_trainable(model: Any, adapter: str, undo: ExitStack, *, pattern: str, rank: int, alpha: float) -> None:
    """An ordinary trainable LoRA on every layer whose name matches `pattern`; the host itself is frozen meanwhile."""
    _record(model, adapter, undo)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights="gaussian")
    inject_adapter_in_model(config, model, adapter)


def _record(model: Any, adapter: str, undo: ExitStack) -> tuple[dict[nn.Parameter, bool], dict[str, list[str]]]:
    """Note what injecting will change, gradients and active adapters, so that `undo` can give it back.

    Raises ValueError where the adapter's name is taken, or where other adapters are disabled: peft keeps that switch
    per layer, so ours would be off with them.
    """
    if adapter in getattr(model, "peft_config", {}):
        raise ValueError(f"{type(model).__name__} already has an adapter named {adapter!r}; delete or rename it")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    if any(layer.disable_adapters for layer in layers.values()):
        raise ValueError(f"the adapters of {type(model).__name__} are disabled; call pipe.enable_lora() first")
    gradients = {p: p.requires_grad for p in model.parameters()}
    active = {name: list(layer.active_adapters) for name, layer in layers.items()}
    undo.callback(lambda: [p.requires_grad_(flag) for p, flag in gradients.items()])
    undo.callback(_activate, model, active)
    undo.callback(_remove, model, adapter, hasattr(model, "peft_config"))
    return gradients, active


def _fill(layer: Any, stack: Stack, variant: GatedLora) -> None:
    weight = layer.get_base_layer().weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    for half, matrix in ((layer.lora_A, stack.down), (layer.lora_B, stack.up)):
        half[ADAPTER].weight = nn.Parameter(matrix.to(weight.device, dtype), requires_grad=False)
    layer.lora_A[ADAPTER].register_buffer("segment", stack.segment.to(weight.device), persistent=False)
    rank = len(stack.segment)
    layer.r[ADAPTER], layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = rank, rank, 1.0
    layer.lora_variant[ADAPTER] = variant
    # Training, `set_adapter` and `enable_lora` turn gradients of active adapters on; experts stay frozen.
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, ADAPTER: ("lora_A", "lora_B")}


def _activate(model: nn.Module, active: Mapping[str, list[str]]) -> None:
    """Set the active adapters of each named layer that is still there."""
    for name, adapters in active.items():
        if isinstance(layer := model.get_submodule(name), LoraLayer):
            layer.set_adapter(adapters)


def _remove(model: Any, adapter: str, had_config: bool) -> None:
    carrying = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A}
    for name, layer in carrying.items():
        if len(layer.lora_A) > 1:
            layer.delete_adapter(adapter)
        else:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    config = getattr(model, "peft_config", {})
    config.pop(adapter, None)
    if not config and not had_config and hasattr(model, "peft_config"):
        del model.peft_config
        model.__dict__.pop("_hf_peft_config_loaded", None)  # the class says False


def stacked(model: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """down [R, Cin] and up [Cout, R] of an injected layer, where the host keeps them now.

    The taps of a convolution are summed: applied to a mean input that gives its mean output, but for the borders.
    """
    layer = model.get_submodule(name)
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return (down.sum((2, 3)), up.sum((2, 3))) if down.dim() == 4 else (down, up)
