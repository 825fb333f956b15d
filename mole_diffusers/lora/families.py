"""The model family of a LoRA and of a pipeline: by what only one family has, else by the LoRA's header.

A transformer's family is known by the names of its layers. UNets have the same names, and texts of different widths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mole_diffusers.lora.expert import LoraWeights

BY_TEXT_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL"}  # of a UNet's cross-attention's input
BY_CLASS = {
    "ChromaTransformer2DModel": "Chroma",
    "CosmosTransformer3DModel": "Anima",
    "Flux2Transformer2DModel": "Flux.2",
    "FluxTransformer2DModel": "Flux",
    "HiDreamImageTransformer2DModel": "HiDream",
    "Krea2Transformer2DModel": "Krea 2",
    "Lumina2Transformer2DModel": "Lumina 2",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "SD3Transformer2DModel": "SD 3",
    "WanTransformer3DModel": "Wan",
    "ZImageTransformer2DModel": "Z-Image",
}
MODEL_FAMILIES = {*BY_TEXT_WIDTH.values(), *BY_CLASS.values()}
# Family -> what the key of a transformer's layer begins with that no other family has, in diffusers' names and the
# original ones. The blocks of Flux have original names that Flux.2 has, too.
BY_LAYER = {
    "SD 3": r"joint_blocks_",
    "Flux.2": r"single_transformer_blocks_\d+_attn_(to_qkv_mlp_proj|to_out)$|transformer_blocks_\d+_ff(_context)?_linear_"
    r"|time_guidance_embed_|(single_stream_modulation|double_stream_modulation_(img|txt))_lin",
    # The other families that have such blocks have fewer than 38 of them.
    "Qwen-Image": r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_|transformer_blocks_(3[89]|[45]\d)_attn_(to|add)_",
    "Z-Image": r"(layers|noise_refiner|context_refiner)_\d+_attention_to_|cap_embedder_|all_(x_embedder|final_layer)_",
    "Lumina 2": r"(layers|noise_refiner|context_refiner)_\d+_(attn_to_|feed_forward_linear_)",
    "Wan": r"blocks_\d+_(self_attn_[qkvo]$|cross_attn_([qkvo]|[kv]_img)$|attn[12]_(to|add)_|ffn_)",
    "HiDream": r"(double|single)_stream_blocks_",
    "Anima": r"blocks_\d+_((self|cross)_attn_(q|k|v|output)_proj|mlp_layer[12]|adaln_modulation_)"
    r"|transformer_blocks_\d+_norm[123]_linear_|llm_adapter_",
    "Krea 2": r"blocks_\d+_(attn_(w[qkvo]|gate)|mlp_(gate|up|down))$|txtfusion_|text_fusion_"
    r"|transformer_blocks_\d+_(attn_to_gate|ff_(gate|up|down))$",
    # Flux.2 has at most 8 double blocks.
    "Flux": r"single_transformer_blocks_|double_blocks_(\d+_(img|txt)_mod_|[89]_|1\d_)|single_blocks_\d+_(modulation_|qkv$)",
}
# The same blocks with the feed-forward that each has. Flux's is 4 times as wide as its states; Flux.2's is 3 times as wide,
# and has a gate of the same size. Layer -> rows / columns of its weight, between those of the two.
FEED_FORWARD = {r"single_blocks_\d+_linear1$": 8, r"double_blocks_\d+_(img|txt)_mlp_0$": 5}
ARCHITECTURES = {  # family -> how modelspec.architecture or ss_base_model_version begins; the first that fits counts
    "SDXL refiner": ("stable-diffusion-xl-v1-refiner",),
    "SDXL": ("stable-diffusion-xl", "sdxl"),
    "SD 1.x": ("stable-diffusion-v1", "sd_v1", "sd_1"),
    "SD 2.x": ("stable-diffusion-v2", "sd_v2"),
    "SD 3": ("stable-diffusion-3", "stable-diffusion-v3", "sd3"),
    "Flux.2": ("flux-2", "flux2", "flux.2"),
    "Flux": ("flux",),
    "Chroma": ("chroma",),
    "Qwen-Image": ("qwen-image", "qwen_image"),
    "Z-Image": ("z-image", "z_image", "zimage"),
    "Lumina 2": ("lumina-2", "lumina2"),
    "Wan": ("wan",),
    "HiDream": ("hidream",),
    "Anima": ("anima",),
    "Krea 2": ("krea-2", "krea2"),
}


def base_of(layers: Mapping[str, Mapping[str, LoraWeights]], metadata: Mapping[str, str]) -> str:
    """The family of a LoRA by its layers, else the one in its header, else "unknown"."""
    return _by_layers(layers) or stated_base(metadata) or "unknown"


def _by_layers(layers: Mapping[str, Mapping[str, LoraWeights]]) -> str | None:
    for layer, weights in layers.get("unet", {}).items():
        if layer.endswith(("attn2_to_k", "attn2_to_v")):
            width = weights.down.shape[1]
            return BY_TEXT_WIDTH.get(width, f"cross-attention {width}")
    named = layers.get("transformer", {})
    for family, pattern in BY_LAYER.items():
        if any(re.match(pattern, layer) for layer in named):
            return family
    for pattern, most in FEED_FORWARD.items():
        for layer, weights in named.items():
            if re.match(pattern, layer):
                return "Flux.2" if len(weights.up) > most * weights.down.shape[1] else "Flux"
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
    if family is not None and not fits(base, family):
        raise ValueError(f"it is made for {base} and this pipeline is {family}")


def fits(base: str, family: str) -> bool:
    """Whether a LoRA for `base` may fit a pipeline of a family. Chroma is a Flux that lost some of its layers."""
    return base not in MODEL_FAMILIES or base == family or {base, family} == {"Flux", "Chroma"}
