"""The model family of a LoRA and of a pipeline: by shapes that only one family has, else by the LoRA's header."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_diffusers.lora.expert import LoraWeights
from mole_diffusers.lora.keys import is_flux

BY_TEXT_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL"}  # of cross-attention's input
BY_INNER_WIDTH = {1536: "SD 3", 2432: "SD 3", 3072: "Flux"}  # of a transformer with text and image streams
BY_CLASS = {"FluxTransformer2DModel": "Flux", "SD3Transformer2DModel": "SD 3"}
MODEL_FAMILIES = {*BY_TEXT_WIDTH.values(), *BY_INNER_WIDTH.values()}
ARCHITECTURES = {  # family -> how modelspec.architecture or ss_base_model_version begins; the first that fits counts
    "SDXL refiner": ("stable-diffusion-xl-v1-refiner",),
    "SDXL": ("stable-diffusion-xl", "sdxl"),
    "SD 1.x": ("stable-diffusion-v1", "sd_v1", "sd_1"),
    "SD 2.x": ("stable-diffusion-v2", "sd_v2"),
    "SD 3": ("stable-diffusion-3", "stable-diffusion-v3", "sd3"),
    "Flux": ("flux",),
}


def base_of(layers: Mapping[str, Mapping[str, LoraWeights]], metadata: Mapping[str, str]) -> str:
    """The family of a LoRA by its shapes, else the one in its header, else "unknown"."""
    return _by_shapes(layers) or stated_base(metadata) or "unknown"


def _by_shapes(layers: Mapping[str, Mapping[str, LoraWeights]]) -> str | None:
    if is_flux((component, layer) for component, named in layers.items() for layer in named):
        return "Flux"
    if any(layer.startswith("joint_blocks_") for layer in layers.get("transformer", {})):  # by its original names
        return "SD 3"
    for layer, weights in layers.get("unet", {}).items():
        if layer.endswith(("attn2_to_k", "attn2_to_v")):
            width = weights.down.shape[1]
            return BY_TEXT_WIDTH.get(width, f"cross-attention {width}")
    for layer, weights in layers.get("transformer", {}).items():
        if layer.endswith(("_add_q_proj", "_add_k_proj", "_add_v_proj")):
            return BY_INNER_WIDTH.get(weights.down.shape[1])
    return None


def stated_base(metadata: Mapping[str, str]) -> str | None:
    """The family that a file's header states. ModelSpec's field takes precedence over kohya's."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        stated = metadata.get(key, "").lower()
        if family := next((f for f, starts in ARCHITECTURES.items() if stated.startswith(starts)), None):
            return family
    return "SD 2.x" if metadata.get("ss_v2", "").lower() == "true" else None


def family_of(hosts: Mapping[str, Any]) -> str | None:
    """The family of a pipeline's models (component -> model); None if it is not a known one."""
    model = hosts.get("unet", hosts.get("transformer"))
    width = getattr(getattr(model, "config", None), "cross_attention_dim", None)
    return BY_CLASS.get(type(model).__name__) or (BY_TEXT_WIDTH.get(width) if isinstance(width, int) else None)


def check_family(base: str, hosts: Mapping[str, Any]) -> None:
    """Raises ValueError if both families are known and differ."""
    family = family_of(hosts)
    if family is not None and base in MODEL_FAMILIES and base != family:
        raise ValueError(f"it is made for {base} and this pipeline is {family}")
