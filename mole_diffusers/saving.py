"""Expert -> an ordinary LoRA file, which diffusers, kohya-format tools and `read_expert` load."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from mole_diffusers.lora_files import PEFT_METADATA, Expert
from mole_diffusers.lora_writing import write_lora

TRIGGERS = "modelspec.trigger_phrase"
# No longer true of the file that is written: scales are folded, so PEFT's alphas are none; hashes are of other bytes.
OUTDATED = {PEFT_METADATA, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
# A layer key has "_" for every dot; these are the words of diffusers' and transformers' models that hold one of their own.
WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks",
    "to_q", "to_k", "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj", "proj_in", "proj_out",
    "proj_mlp", "conv_in", "conv_out", "conv_shortcut", "time_embedding", "add_embedding", "time_emb_proj", "linear_1",
    "linear_2", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection", "ff_context", "norm1_context",
    "norm_out", "x_embedder", "pos_embed", "context_embedder", "time_text_embed", "timestep_embedder", "text_embedder",
    "guidance_embedder",
    "attentions", "resnets", "downsamplers", "upsamplers", "attn", "attn1", "attn2", "ff", "net", "proj", "conv", "conv1",
    "conv2", "norm", "norm1", "linear", "encoder", "layers", "mlp", "fc1", "fc2",
    "block", "layer", "SelfAttention", "DenseReluDense", "q", "k", "v", "o", "wi_0", "wi_1", "wo",
)  # fmt: skip
_WORD = f"(?:{'|'.join(sorted(WORDS, key=len, reverse=True))}|\\d+)"


def save_expert(expert: Expert, path: str | Path, *, format: str = "diffusers", dtype: torch.dtype = torch.float16) -> None:
    """Write an expert, a merge say, as one ordinary LoRA file with its trigger words and what its header said.

    Args:
        format: "diffusers" or "kohya" keys.
        dtype: of the tensors in the file.

    Raises:
        ValueError: an unknown format; a layer whose name in the model cannot be told from its key; a number that
            `dtype` cannot hold.
    """
    layers = {part: {module_name(key): w for key, w in found.items()} for part, found in expert.layers.items()}
    said = {key: value for key, value in expert.metadata.items() if key not in OUTDATED}
    if expert.triggers:
        said[TRIGGERS] = ", ".join(expert.triggers)
    write_lora(layers, path, format=format, dtype=dtype, metadata=said)


def module_name(key: str) -> str:
    """The dotted module name of a layer key: "mid_block_attentions_0_proj_in" -> "mid_block.attentions.0.proj_in".

    Raises ValueError for a key with words that no known model has, since its dots would be a guess.
    """
    if not re.fullmatch(f"{_WORD}(?:_{_WORD})*", key):
        raise ValueError(f"the layer {key!r} has words that no known model uses, so its module's name cannot be told")
    return ".".join(re.findall(f"({_WORD})(?:_|$)", key))
