"""Offloaded pipelines: weights are elsewhere between calls, and hooks refer to each module as it was when they were
added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import cpu_offload
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING, _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn

HOOKS = ("_hf_hook", "_diffusers_hook")  # attributes of modules in which Accelerate or diffusers keep hooks


@contextmanager
def loaded(pipe: Any) -> Iterator[None]:
    """Remove a pipeline's offloading hooks while the block changes its modules, and then add them again.

    diffusers itself does so when it loads a LoRA, for the same device.
    """
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    modules = [module for model in models for module in model.modules()]
    if not any(name in vars(module) for module in modules for name in HOOKS):
        yield
        return
    device, offloaded = _device(modules), [model for model in models if hasattr(model, "_hf_hook")]
    flags = [{name: p.requires_grad for name, p in module._parameters.items() if p is not None} for module in modules]
    whole, layers, _ = _func_optionally_disable_offloading(pipe)
    if layers:  # Accelerate gives back plain tensors
        for module, flag in zip(modules, flags, strict=True):
            for name, trains in flag.items():
                weight: Any = module._parameters[name]
                module._parameters[name] = nn.Parameter(weight, requires_grad=trains)
    try:
        yield
    finally:
        if whole:
            pipe.enable_model_cpu_offload(device=device)
        elif layers:
            for model in offloaded:
                cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)
        for model in models:
            _maybe_remove_and_reapply_group_offloading(model)


def moves_parts(model: nn.Module) -> bool:
    """Whether hooks on parts of a model move their weights, so that these must stay the tensors that they are."""
    for module in model.modules():
        registry: Any = vars(module).get("_diffusers_hook")
        if registry is not None and registry.get_hook(_GROUP_OFFLOADING) is not None:
            return True
        if module is not model and "_hf_hook" in vars(module):
            return True
    return False


def _device(modules: Iterable[nn.Module]) -> Any:
    """The device where offloaded models compute; None if Accelerate offloads none."""
    for module in modules:
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if (device := getattr(one, "execution_device", None)) is not None:
                return device
    return None
