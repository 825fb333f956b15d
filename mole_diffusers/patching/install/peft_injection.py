"""Puts the experts into a model, as one peft adapter whose ranks the gates scale. Only this file imports peft.

peft calls a `LoraVariant` instead of its own LoRA arithmetic. So `disable_lora`, the `scale` argument, other adapters,
quantised layers and other hooks keep working. This extension point is private to peft.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.overrides import TorchFunctionMode

from mole_diffusers.lora.expert import LoraWeights
from mole_diffusers.lora.keys import layer_key
from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching.gating.gate_location import GateLocation
from mole_diffusers.patching.gating.gated_experts import ADAPTER, GatedExperts
from mole_diffusers.patching.hooks import ForwardHook, ForwardInput
from mole_diffusers.patching.undo import Undo
from mole_diffusers.safe_files import check_memory

BY_NAME = ("proj_in", "proj_out")  # layers of AnimateDiff's motion modules that get their input as `input=`


class GatedLinear(lora.Linear):
    """peft's linear layer. If only the experts are added to a plain weight, it only runs their arithmetic."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.lora_variant[ADAPTER].linear(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


def inject(
    model: Any,
    stacks: Mapping[str, Stack],
    held: Mapping[str, Stack],
    layers: Mapping[str, tuple[GateLocation, str | None]],
    undo: Undo,
) -> None:
    """Put experts on the named layers of `model`, each change recorded in `undo` first.

    `stacks` has all experts of each layer, `held` those whose ranks it gets, and `layers` the gate location of its gate,
    and what it reads, see `placement.token_type_of`.
    """
    before, active = _record(model, ADAPTER, undo)
    targets = "|".join(re.escape(name) for name in stacks)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    with _Empty():
        inject_adapter_in_model(config, model, ADAPTER)
    model._hf_peft_config_loaded = True
    for name, stack in stacks.items():
        _prepare(model.get_submodule(name), stack, *layers[name], name)
        if layers[name][1] is None and name.endswith(BY_NAME):
            ByPosition().register(model.get_submodule(name), undo)
    fill(model, held)
    _activate(model, {name: [*active.get(name, []), ADAPTER] for name in (*active, *stacks)})
    for p, flag in before.items():  # peft froze the model, but its own parameters are up to the user
        p.requires_grad_(flag)


class _Empty(TorchFunctionMode):
    """New layers get no memory and no random numbers, in this thread: `fill` gives them their matrices.

    (peft's own `low_cpu_mem_usage` patches nn.Module for all threads.)
    """

    def __torch_function__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if call is nn.init.kaiming_uniform_:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        place = {"device": "meta"} if call is torch.empty else {}
        return call(*args, **(kwargs or {}) | place)


class ByPosition(ForwardHook):
    """On a layer that gets its input as `input=`; peft's layers have another name for it."""

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> ForwardInput | None:
        return ((kwargs["input"],), {}) if "input" in kwargs else None


def inject_trainable(model: Any, adapter: str, undo: Undo, *, pattern: str, rank: int, alpha: float) -> None:
    """An ordinary trainable LoRA on every layer whose name matches `pattern`. The model itself is frozen meanwhile."""
    _record(model, adapter, undo)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights="gaussian")
    inject_adapter_in_model(config, model, adapter)


def _record(model: Any, adapter: str, undo: Undo) -> tuple[dict[nn.Parameter, bool], dict[str, list[str]]]:
    """Record what injecting will change, gradients and active adapters, so that `undo` can restore it.

    Raises ValueError if the adapter's name is taken, or if other adapters are disabled or fused: peft switches whole
    layers, so ours would be off, too.
    """
    if adapter in getattr(model, "peft_config", {}):
        raise ValueError(f"{type(model).__name__} already has an adapter named {adapter!r}; delete or rename it")
    refuse_switched_off(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            f"adapters are fused into {type(model).__name__}; call pipe.unfuse_lora() first, or "
            f"pipe.unload_lora_weights(), which keeps what is fused"
        )
    gradients = {p: p.requires_grad for p in model.parameters()}
    active = {name: list(layer.active_adapters) for name, layer in layers.items()}
    undo.callback(lambda: [p.requires_grad_(flag) for p, flag in gradients.items()])
    undo.callback(_activate, model, active)
    undo.callback(_remove, model, adapter, hasattr(model, "peft_config"))
    return gradients, active


def fill(model: Any, stacks: Mapping[str, Stack]) -> None:
    """Give injected layers these matrices in place of those that they have.

    Raises RefusedFileError if memory does not suffice.
    """
    check_memory(sum(stack.nbytes for stack in stacks.values()), "the experts, stacked for the host, take")
    with torch.inference_mode(False):  # they are also used with gradients
        for name, stack in stacks.items():
            layer = model.get_submodule(name)
            weight, dtype = layer.get_base_layer().weight, _computed_in(layer.get_base_layer())
            for half, matrix in ((layer.lora_A, stack.down), (layer.lora_B, stack.up)):
                half[ADAPTER].weight = nn.Parameter(matrix.to(weight.device, dtype), requires_grad=False)
            layer.lora_A[ADAPTER].register_buffer("expert_index", stack.expert_index.to(weight.device), persistent=False)
            layer.lora_variant[ADAPTER].hold(stack.ranks)


def _prepare(layer: Any, stack: Stack, location: GateLocation, token_type: str | None, name: str) -> None:
    rank = sum(stack.ranks)
    layer.r[ADAPTER], layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = rank, rank, 1.0
    component = location.name.partition(".")[0]
    layer.lora_variant[ADAPTER] = GatedExperts(location, stack, layer, f"{component}.{name}", token_type)
    if type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = GatedLinear
    # Training, `set_adapter` and `enable_lora` turn gradients of active adapters on; experts stay frozen.
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, ADAPTER: ("lora_A", "lora_B")}


def _computed_in(module: Any) -> torch.dtype:
    """The dtype of a layer's product; its weight may be stored in fewer bits."""
    hook = getattr(module, "_diffusers_hook", None)
    casting = hook and hook.get_hook("layerwise_casting")
    said = (casting or module).__dict__.get("compute_dtype")  # GGUF and bitsandbytes layers have it, too
    if said is not None:
        return said
    dtype = module.weight.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32


def _activate(model: nn.Module, active: Mapping[str, list[str]]) -> None:
    """Set the active adapters of each named layer that still exists."""
    for name, adapters in active.items():
        if isinstance(layer := model.get_submodule(name), LoraLayer):
            layer.set_adapter(adapters)


def _remove(model: Any, adapter: str, had_config: bool) -> None:
    carrying = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A}
    for name, layer in carrying.items():
        if len(layer.lora_A) > 1:
            if type(layer) is GatedLinear:
                layer.__class__ = lora.Linear
            layer.delete_adapter(adapter)
        else:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    config = getattr(model, "peft_config", {})
    config.pop(adapter, None)
    if not config and not had_config and hasattr(model, "peft_config"):
        del model.peft_config
        model.__dict__.pop("_hf_peft_config_loaded", None)  # the class says False


def switched_off(model: nn.Module) -> bool:
    """Whether `disable_lora` has switched a model's adapters off."""
    return any(layer.disable_adapters for layer in adapted(model))


def refuse_switched_off(model: nn.Module) -> None:
    """Raise ValueError if a model's adapters are switched off: what is added to them would be off, too."""
    if switched_off(model):
        raise ValueError(f"the adapters of {type(model).__name__} are disabled; call pipe.enable_lora() first")


def switches(models: Iterable[nn.Module]) -> dict[nn.Module, bool]:
    """For models with LoRAs: whether they are switched off."""
    return {model: switched_off(model) for model in models if adapted(model)}


def switch(models: Iterable[nn.Module], *, on: bool) -> None:
    """Switch all adapters of models on or off, as `enable_lora` and `disable_lora` do."""
    for model in models:
        for layer in adapted(model):
            layer.enable_adapters(on)


def off_after(models: Sequence[nn.Module], off: Sequence[nn.Module], before: Mapping[nn.Module, bool]) -> list[nn.Module]:
    """The models whose adapters should be off after a lifted block; those in `off` were off before it.

    Models without LoRAs in the block follow a switch of the others, since calls of the pipeline switch all that they
    find. LoRAs that were added inside do not switch a model on.

    Args:
        before: the result of `switches` when the block began.
    """
    now = {model: is_off for model, is_off in switches(models).items() if model in before or is_off}
    switched = {is_off for model, is_off in now.items() if is_off != before.get(model, False)}
    others = models if switched == {True} else () if switched == {False} else off
    return [model for model in models if now.get(model, model in others)]


def adapted(model: nn.Module) -> list[Any]:
    """The layers of a model that have LoRAs: the mixture's experts or ordinary ones."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def also_loaded(model: nn.Module, layers: Mapping[str, LoraWeights]) -> list[str]:
    """The active ordinary adapters of a model that are the LoRA with these layers, by layer key: the first layer that both
    have has the same matrices, up to a factor.
    """
    found: dict[str, bool] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or (weights := layers.get(layer_key(name))) is None:
            continue
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A and adapter not in (ADAPTER, *found):
                halves = (layer.lora_A[adapter].weight, weights.down), (layer.lora_B[adapter].weight, weights.up)
                found[adapter] = layer.scaling[adapter] != 0 and all(_point_alike(*half) for half in halves)
    return [adapter for adapter, is_same in found.items() if is_same]


def _point_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two matrices are the same up to a factor, and what half precision rounds off."""
    if one.shape != other.shape or one.is_meta:
        return False
    return bool(torch.cosine_similarity(one.detach().float().cpu().flatten(), other.float().cpu().flatten(), 0) > 0.9999)


def stacked(model: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """down [R, Cin] and up [Cout, R] of an injected layer, wherever the model keeps them now.

    The taps of a convolution are summed. Applied to the mean of an input, this gives the mean output, except for the
    borders.
    """
    layer = model.get_submodule(name)
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return (down.sum((2, 3)), up.sum((2, 3))) if down.dim() == 4 else (down, up)


def ups(model: Any) -> dict[str, tuple[nn.Module, nn.Module]]:
    """layer -> the modules that hold `up`, and expert_index [R]. The input of the first is z times the weights."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and ADAPTER in m.lora_A}
    return {name: (layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]) for name, layer in layers.items()}
