"""Write experts and LoRA weights as an ordinary LoRA file, atomically.

diffusers, tools for kohya's format and `read_expert` load the file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mole_diffusers.lora.dora import SHAPES
from mole_diffusers.lora.expert import Embeddings, Expert, LoraWeights
from mole_diffusers.lora.families import base_of
from mole_diffusers.lora.keys import KOHYA_PREFIXES, ONETRAINER_PREFIX, layer_key
from mole_diffusers.lora.metadata import PEFT_METADATA
from mole_diffusers.whole_files import new_file

Layers = Mapping[str, Mapping[str, LoraWeights]]  # component -> {module name in the host: weights}
FORMATS = ("diffusers", "kohya")
TRIGGERS = "modelspec.trigger_phrase"
# Wrong for the new file: scales are folded in, so PEFT's alphas no longer apply, and hashes are of other bytes.
OUTDATED = {PEFT_METADATA, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
# A layer key has "_" for every dot; these are the words in diffusers' and transformers' module names.
MODULE_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks",
    "to_q", "to_k", "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj", "proj_in", "proj_out",
    "proj_mlp", "conv_in", "conv_out", "conv_shortcut", "time_embedding", "add_embedding", "time_emb_proj", "linear_1",
    "linear_2", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection", "ff_context", "norm1_context",
    "norm_out", "x_embedder", "pos_embed", "context_embedder", "time_text_embed", "timestep_embedder", "text_embedder",
    "guidance_embedder", "time_guidance_embed", "single_stream_modulation", "double_stream_modulation_img",
    "double_stream_modulation_txt", "to_qkv_mlp_proj", "linear_in", "linear_out", "img_in", "txt_in", "img_mod", "txt_mod",
    "img_mlp", "txt_mlp", "noise_refiner", "context_refiner", "attention", "feed_forward", "w1", "w2", "w3",
    "distilled_guidance_layer", "in_proj", "blocks", "ffn", "condition_embedder", "time_embedder", "time_proj",
    "adaLN_modulation", "t_embedder", "cap_embedder", "all_x_embedder", "all_final_layer", "motion_modules", "time_embed",
    "emb", "caption_projection", "time_mod_proj", "text_fusion", "layerwise_blocks", "refiner_blocks", "projector",
    "double_stream_blocks", "single_stream_blocks", "to_q_t", "to_k_t", "to_v_t", "to_out_t", "ff_i", "ff_t",
    "shared_experts", "p_embedder", "pooled_embedder",
    "to_gate", "gate", "up", "down", "final_layer", "time_caption_embed", "caption_embedder", "linear_3",
    "attentions", "resnets", "downsamplers", "upsamplers", "attn", "attn1", "attn2", "ff", "net", "proj", "conv", "conv1",
    "conv2", "norm", "norm1", "norm2", "norm3", "patch_embed", "linear", "encoder", "layers", "mlp", "fc1", "fc2",
    "block", "layer", "SelfAttention", "DenseReluDense", "q", "k", "v", "o", "wi_0", "wi_1", "wo",
)  # fmt: skip
# Ends of layer keys of UNets whose convolutions have a kernel of 3 x 3
KERNEL_3 = ("_conv1", "_conv2", "conv_in", "conv_out", "samplers_0_conv")
_WORD = f"(?:{'|'.join(sorted(MODULE_WORDS, key=len, reverse=True))}|\\d+(?:-\\d+)?)"


def write_lora(
    layers: Layers,
    path: str | Path,
    *,
    format: str = "diffusers",
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
    alphas: bool = False,
    embeddings: Embeddings | None = None,
) -> None:
    """Write one ordinary LoRA.

    Every scale is folded into the up matrix, so that alpha equals the rank. This is the default of all readers, so they
    cannot mix up the layers' scales.

    Args:
        format: "diffusers" keys, or "kohya" keys.
        alphas: write an alpha for each layer instead, which readers of kohya's keys know.
        dtype: of the tensors in the file.
        metadata: strings for the file header.
        embeddings: those that were trained with it, for kohya keys. diffusers reads no file with such keys, so there they
            are left out, with a warning.

    Raises:
        ValueError: an unknown format, no layers, or a number that `dtype` cannot hold.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown LoRA format {format!r}; known: {list(FORMATS)}")
    down, up = ("lora_down", "lora_up") if format == "kohya" else ("lora_A", "lora_B")
    prefixes = _kohya_prefixes(layers, metadata or {})
    tensors = {}
    for component, modules in layers.items():
        for module, weights in modules.items():
            # CLIPTextModel lost its `text_model` level in transformers 5.6; readers of every age know the name with it.
            full = f"text_model.{module}" if module.startswith("encoder.layers.") else module
            stem = prefixes[component] + full.replace(".", "_") if format == "kohya" else f"{component}.{full}"
            if alphas:
                tensors[f"{stem}.alpha"] = torch.tensor(weights.scale * len(weights.down))
            scale = 1.0 if alphas else weights.scale
            for half, matrix in ((down, weights.down.float()), (up, weights.up.float() * scale)):
                tensors[f"{stem}.{half}.weight"] = _held(matrix, dtype, f"{component}.{module}")
            if weights.magnitude is not None:
                end, role = ("dora_scale",) * 2 if format == "kohya" else ("lora_magnitude_vector", "magnitude")
                shape = SHAPES[role][weights.down.dim() == 4]
                tensors[f"{stem}.{end}"] = weights.magnitude.to(dtype).reshape(shape)
    if not tensors:
        raise ValueError(f"there is no layer to write to {path}")
    if embeddings:
        tensors |= _embedding_tensors(embeddings, path, format, dtype)
    save_atomically(tensors, path, {"format": "pt", **(metadata or {})})


def _held(matrix: torch.Tensor, dtype: torch.dtype, layer: str) -> torch.Tensor:
    if not matrix.abs().max() <= torch.finfo(dtype).max:  # NaN, too
        raise ValueError(f"the layer {layer} holds numbers that {dtype} cannot; use a wider dtype")
    return matrix.to(dtype).contiguous()


def _embedding_tensors(embeddings: Embeddings, path: str | Path, format: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if format != "kohya":
        words = ", ".join(map(repr, embeddings))
        warnings.warn(f"{path} is without the embeddings of {words}: only a file with kohya keys has some", stacklevel=4)
        return {}
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    return {
        f"bundle_emb.{word}.{names[part]}": vectors.to(dtype).contiguous()
        for word, parts in embeddings.items()
        for part, vectors in parts.items()
    }


def _kohya_prefixes(layers: Layers, metadata: Mapping[str, str]) -> dict[str, str]:
    """Component -> the prefix of its kohya keys: te1 for the first of several text encoders, te for a single one."""
    prefixes = {component: prefix for prefix, component in KOHYA_PREFIXES.items()}
    base = base_of({part: {layer_key(name): w for name, w in found.items()} for part, found in layers.items()}, metadata)
    if base not in ("SDXL", "SD 3", "Flux") and "text_encoder_2" not in layers:
        prefixes["text_encoder"] = "lora_te_"
    # kohya has no names for a transformer's layers as diffusers splits them; other tools know OneTrainer's names.
    return prefixes | {"transformer": ONETRAINER_PREFIX}


def save_expert(expert: Expert, path: str | Path, *, format: str = "diffusers", dtype: torch.dtype = torch.float16) -> None:
    """Write an expert (for example a merge) as one ordinary LoRA file, with its trigger words and its header's metadata.

    Args:
        format: "diffusers" or "kohya" keys. Trained embeddings are in a file with kohya keys alone, see `write_lora`.
        dtype: of the tensors in the file.

    Raises:
        ValueError: an unknown format; a layer whose module name cannot be derived from its key; a number that `dtype`
            cannot hold.
    """
    layers = {
        component: {module_name(key): _as_convolution(key, w, expert.base) for key, w in found.items()}
        for component, found in expert.layers.items()
    }
    metadata = {key: value for key, value in expert.metadata.items() if key not in OUTDATED} | trigger_phrase(
        expert.triggers
    )
    write_lora(layers, path, format=format, dtype=dtype, metadata=metadata, embeddings=expert.embeddings)


def _as_convolution(key: str, weights: LoraWeights, base: str) -> LoraWeights:
    """Weights in the shape of a convolution if the layer's name says that it is one, since files of LoHa do not tell."""
    side = 3 if key.endswith(KERNEL_3) else 1
    named = side == 3 or key.endswith("conv_shortcut") or (base == "SD 1.x" and key.endswith(("proj_in", "proj_out")))
    if weights.down.dim() == 4 or not named or weights.down.shape[1] % side**2:
        return weights
    return replace(weights, down=weights.down.reshape(weights.rank, -1, side, side), up=weights.up[..., None, None])


def trigger_phrase(words: Sequence[str]) -> dict[str, str]:
    """Trigger words as metadata for a header; empty if there are none."""
    return {TRIGGERS: ", ".join(dict.fromkeys(words))} if words else {}


def module_name(key: str) -> str:
    """The dotted module name of a layer key: "mid_block_attentions_0_proj_in" -> "mid_block.attentions.0.proj_in".

    Raises ValueError for a key with words that no known model has, because the dots would be a guess.
    """
    if not re.fullmatch(f"{_WORD}(?:_{_WORD})*", key):
        raise ValueError(f"the layer {key!r} has words that no known model uses, so its module name cannot be derived")
    return ".".join(re.findall(f"({_WORD})(?:_|$)", key))


def save_atomically(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write safetensors; a file already at `path` stays until the new one is complete.

    Raises OSError if it cannot be written, for example because the disk is full (safetensors raises its own type).
    """
    try:
        with new_file(path) as part:
            save_file(dict(tensors), part, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
