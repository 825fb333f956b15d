"""Calls of a pipeline or model that would lose or break its experts: they run on the original model, or are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

from diffusers import ModelMixin

from mole_diffusers.patching.install.peft_injection import ADAPTER, adapted
from mole_diffusers.patching.undo import Undo

Lift = Callable[[], AbstractContextManager[None]]  # the original pipeline while a block runs

ON_THE_ORIGINAL = (
    "save_pretrained", "load_lora_adapter", "load_adapter", "add_adapter", "set_adapters", "set_default_attn_processor"
)  # fmt: skip
FUSED = "q, k and v of a pipeline with a mixture cannot be fused: each has experts of its own; detach first"
MERGED = (
    "LoRAs cannot be fused under a mixture, whose gated experts would be off in the layers; fuse them before attach, or "
    "use mixture.collapsed() or mixture.export_lora() for the experts"
)
SWAPPED = (
    "enable_lora_hotswap must come before attach, and before the first load_lora_weights of a drop-in: it prepares layers "
    "for the LoRAs that are loaded afterwards; detach first"
)
PARTIAL = "{name} carries the experts of a mixture; take its weights inside `with mixture.lifted():`"
PICKLE = "a {kind} with a mixture on it cannot be pickled or copied by parts; do that inside `with mixture.lifted():`"


def guard(
    pipe: Any,
    models: Iterable[Any],
    *,
    lift: Lift,
    remove: Callable[[], None],
    copy: Callable[[dict[int, Any]], Any],
    undo: Undo,
) -> None:
    """Watch the calls of a pipeline and of the models with experts.

    Saving a model, and loading or choosing ordinary LoRAs beside the mixture, run on the original models. Otherwise
    diffusers would write peft's own names, which load as random weights, make the mixture's adapter inactive, and not
    know its attention processors. Fusing is refused, and so is taking the weights of a part of a model, as
    `ControlNetModel.from_unet` does.

    Removing all LoRAs, or this adapter by its name, first takes the mixture off: `remove()`. A deep copy of the pipeline
    is `copy(memo)`; a deep copy of a model is one of the original model. Pickling is refused.

    Another pipeline over the same models is not watched, and diffusers accesses a text encoder's layers directly. So the
    layers themselves keep the mixture's adapter active, and refuse to be fused.
    """
    for name in vars(pipe):
        if name.startswith("tokenizer") and getattr(pipe, name) is not None:  # it may have words of the experts
            _wrap(getattr(pipe, name), "save_pretrained", partial(_on_the_original, lift), undo)
    _wrap(pipe, "fuse_lora", partial(_refused, MERGED), undo)
    undo.override(pipe, "__deepcopy__", copy)
    undo.override(pipe, "__reduce_ex__", partial(_not_pickled, pipe))
    for model in models:
        undo.override(model, "__deepcopy__", partial(_deepcopy, model, lift))
        undo.override(model, "__reduce_ex__", partial(_not_pickled, model))
        for name in ON_THE_ORIGINAL:
            _wrap(model, name, partial(_on_the_original, lift), undo)
        _wrap(model, "unload_lora", partial(_after_removing, remove), undo)
        _wrap(model, "delete_adapters", partial(_deleted, remove), undo)
        _wrap(model, "fuse_qkv_projections", partial(_refused, FUSED), undo)
        _wrap(model, "fuse_lora", partial(_refused, MERGED), undo)
        _wrap(model, "enable_lora_hotswap", partial(_refused, SWAPPED), undo)
        for layer in adapted(model):
            _wrap(layer, "merge", partial(_refused, MERGED), undo)
            if ADAPTER in layer.lora_A:
                _wrap(layer, "set_adapter", _chosen_beside, undo)
        if isinstance(model, ModelMixin):
            _watch_parts(model, undo)
        elif hasattr(model, "final_layer_norm") and not hasattr(model, "text_model"):
            # diffusers' `clip_skip` looks for a module that transformers 5.6 removed
            undo.override(model, "text_model", model)


def _wrap(owner: Any, name: str, call: Callable[..., Any], undo: Undo) -> None:
    """Override one object's method by `call(its method, self, ...)`. Does nothing if the object has no such method.

    A method that a subclass overrides, as in a drop-in pipeline, already handles mixtures and stays.
    """
    found = getattr(type(owner), name, None)
    if found is None or found.__module__.startswith("mole_diffusers"):
        return
    undo.override(owner, name, MethodType(update_wrapper(partial(call, found), found), owner))


def _deepcopy(model: Any, lift: Lift, memo: dict[int, Any]) -> Any:
    with lift():
        return deepcopy(model, memo)


def _not_pickled(owner: Any, _: int) -> Any:
    raise ValueError(PICKLE.format(kind=type(owner).__name__))


def _on_the_original(lift: Lift, found: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    # Swapped weights go into an existing adapter, whose layers a compiled model already knows.
    with nullcontext() if kwargs.get("hotswap") is True else lift():
        return found(model, *args, **kwargs)


def _after_removing(remove: Callable[[], None], found: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    remove()
    return found(model, *args, **kwargs)


def _deleted(remove: Callable[[], None], found: Any, model: Any, adapter_names: str | list[str]) -> Any:
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if ADAPTER in names:
        remove()
    others = [name for name in names if name != ADAPTER]
    return found(model, others) if others else None


def _chosen_beside(found: Any, layer: Any, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> Any:
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    return found(layer, [*(name for name in names if name != ADAPTER), ADAPTER], *args, **kwargs)


def _refused(why: str, *_: Any, **__: Any) -> None:
    raise ValueError(why)


def _watch_parts(model: Any, undo: Undo) -> None:
    for name, child in model.named_children():
        if any(ADAPTER in key for key, _ in child.named_parameters()):
            undo.hook(child.register_state_dict_pre_hook, partial(_whole_only, name))


def _whole_only(name: str, _: Any, prefix: str, *__: Any) -> None:
    """The state dict of a whole model has a prefix for each part, so a prefix means a part."""
    if not prefix:
        raise ValueError(PARTIAL.format(name=name))
