"""Which family of models a LoRA was made for and a pipeline is: by the shapes that only one family has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_diffusers.lora.expert import LoraWeights
from mole_diffusers.lora.keys import of_flux

BY_TEXT_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL"}  # what cross-attention reads
BY_INNER_WIDTH = {1536: "SD 3", 2432: "SD 3", 3072: "Flux"}  # of a transformer with text and picture streams
BY_CLASS = {"FluxTransformer2DModel": "Flux", "SD3Transformer2DModel": "SD 3"}
FAMILIES = {*BY_TEXT_WIDTH.values(), *BY_INNER_WIDTH.values()}


def base_of(layers: Mapping[str, Mapping[str, LoraWeights]], stated: str | None) -> str:
    """The family of a LoRA by its shapes, else the one its metadata states, else "unknown"."""
    return _by_shapes(layers) or stated or "unknown"


def _by_shapes(layers: Mapping[str, Mapping[str, LoraWeights]]) -> str | None:
    if of_flux((part, layer) for part, named in layers.items() for layer in named):
        return "Flux"
    for layer, weights in layers.get("unet", {}).items():
        if layer.endswith(("attn2_to_k", "attn2_to_v")):
            width = weights.down.shape[1]
            return BY_TEXT_WIDTH.get(width, f"cross-attention {width}")
    for layer, weights in layers.get("transformer", {}).items():
        if layer.endswith(("_add_q_proj", "_add_k_proj", "_add_v_proj")):
            return BY_INNER_WIDTH.get(weights.down.shape[1])
    return None


def family_of(hosts: Mapping[str, Any]) -> str | None:
    """The family of a pipeline's models (part -> model), None where it is none of the known ones."""
    for model in (hosts[part] for part in ("unet", "transformer") if part in hosts):
        if (name := type(model).__name__) in BY_CLASS:
            return BY_CLASS[name]
        width = getattr(getattr(model, "config", None), "cross_attention_dim", None)
        return BY_TEXT_WIDTH.get(width) if isinstance(width, int) else None
    return None


def check_family(base: str, hosts: Mapping[str, Any]) -> None:
    """Raises ValueError where both families are known and differ."""
    family = family_of(hosts)
    if family is not None and base in FAMILIES and base != family:
        raise ValueError(f"it is made for {base} and this pipeline is {family}")
