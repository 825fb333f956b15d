"""Layer names of the original Flux and SD 3 transformers -> diffusers' names, both with underscores.

The originals hold q, k and v (and the feed-forward of a single block) in one matrix, which diffusers has as several.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from mole_diffusers.lora.expert import LoraWeights

Layers = dict[str, LoraWeights]
Split = Callable[[LoraWeights, tuple[str, ...]], Layers]

ATTENTION = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
OUT = {"img": "to_out_0", "txt": "to_add_out"}
CONTEXT = {"img": "", "txt": "_context"}
STREAM = {"x": "img", "context": "txt"}
EMBEDDERS = {
    "img_in": "x_embedder", "img_in_proj": "x_embedder", "txt_in": "context_embedder", "x_embedder_proj": "pos_embed_proj",
    "final_layer_linear": "proj_out",
    "t_embedder_mlp_0": "time_text_embed_timestep_embedder_linear_1",
    "t_embedder_mlp_2": "time_text_embed_timestep_embedder_linear_2",
    "y_embedder_mlp_0": "time_text_embed_text_embedder_linear_1",
    "y_embedder_mlp_2": "time_text_embed_text_embedder_linear_2",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
}  # fmt: skip
DOUBLE = re.compile(r"double_blocks_(\d{1,3})_(img|txt)_(\w+)$")
SINGLE = re.compile(r"single_blocks_(\d{1,3})_(\w+)$")
JOINT = re.compile(r"joint_blocks_(\d{1,3})_(x|context)_block_(\w+)$")
FEED_FORWARD = {"mlp_0": "net_0_proj", "mlp_2": "net_2", "mlp_fc1": "net_0_proj", "mlp_fc2": "net_2"}


def split(layer: str, weights: LoraWeights) -> Layers:
    """The host layers that one layer of a file stands for; a name of diffusers' own, or of a UNet, as it is."""
    targets, how = _meaning(layer)
    return how(weights, targets)


def is_original(layer: str) -> bool:
    """Whether this is a name of an original transformer."""
    return _meaning(layer)[0] != (layer,)


def _meaning(layer: str) -> tuple[tuple[str, ...], Split]:
    """The host's names, and how the rows of the up matrix are theirs."""
    if layer in EMBEDDERS:
        return (EMBEDDERS[layer],), _whole
    if layer == "final_layer_adaLN_modulation_1":
        return ("norm_out_linear",), _swapped
    if found := SINGLE.match(layer):
        return _single(f"single_transformer_blocks_{found[1]}", found[2], layer)
    if found := DOUBLE.match(layer):
        return _stream(f"transformer_blocks_{found[1]}", found[2], found[3]) or ((layer,), _whole)
    if found := JOINT.match(layer):
        return _stream(f"transformer_blocks_{found[1]}", STREAM[found[2]], found[3]) or ((layer,), _whole)
    return (layer,), _whole


def _single(block: str, rest: str, layer: str) -> tuple[tuple[str, ...], Split]:
    names = tuple(f"{block}_{name}" for name in ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"))
    if rest == "linear1":
        return names, _square_then_rest
    if found := re.match(r"linear1_([0-3])$", rest):
        return (names[int(found[1])],), _whole
    known = {"linear2": "proj_out", "modulation_lin": "norm_linear"}
    return ((f"{block}_{known[rest]}",) if rest in known else (layer,)), _whole


def _stream(block: str, stream: str, rest: str) -> tuple[tuple[str, ...], Split] | None:
    """One stream, picture or text, of a block with both; None for a name that is not known."""
    if found := re.match(r"(attn2?)_qkv(?:_([0-2]))?$", rest):
        names = tuple(f"{block}_{found[1]}_{name}" for name in ATTENTION[stream])
        return (names, _equal) if found[2] is None else ((names[int(found[2])],), _whole)
    if found := re.match(r"(attn2?)_proj$", rest):
        return (f"{block}_{found[1]}_{OUT[stream]}",), _whole
    if rest in FEED_FORWARD:
        return (f"{block}_ff{CONTEXT[stream]}_{FEED_FORWARD[rest]}",), _whole
    if rest in ("mod_lin", "adaLN_modulation_1"):
        return (f"{block}_norm1{CONTEXT[stream]}_linear",), _modulation
    return None


# ---- the rows of the up matrix


def _whole(weights: LoraWeights, names: tuple[str, ...]) -> Layers:
    return {names[0]: weights}


def _equal(weights: LoraWeights, names: tuple[str, ...]) -> Layers:
    if weights.up.shape[0] % len(names):
        raise ValueError(f"{weights.up.shape[0]} rows are not {len(names)} equal parts")
    return _rows(weights, dict.fromkeys(names, weights.up.shape[0] // len(names)))


def _square_then_rest(weights: LoraWeights, names: tuple[str, ...]) -> Layers:
    """q, k and v are as wide as the input; the feed-forward is what is left."""
    *square, last = names
    sizes = dict.fromkeys(square, weights.down.shape[1])
    rest = weights.up.shape[0] - sum(sizes.values())
    if rest <= 0:
        raise ValueError(f"{weights.up.shape[0]} rows do not hold q, k, v and a feed-forward of {weights.down.shape[1]}")
    return _rows(weights, sizes | {last: rest})


def _rows(weights: LoraWeights, sizes: dict[str, int]) -> Layers:
    parts = zip(sizes, weights.up.split(list(sizes.values())), strict=True)
    return {name: _trimmed(weights, up) for name, up in parts}


def _trimmed(weights: LoraWeights, up: torch.Tensor) -> LoraWeights:
    """Without the ranks of the other parts, which are columns of zeros where the trainer kept q, k and v apart."""
    kept = up.float().transpose(0, 1).flatten(1).any(1)  # [r]
    kept[0] |= not kept.any()
    return LoraWeights(weights.down[kept].clone(), up[:, kept].clone(), weights.scale, weights.error)


def _swapped(weights: LoraWeights, names: tuple[str, ...]) -> Layers:
    """diffusers has scale before shift in its last normalisation."""
    shift, scale = weights.up.chunk(2)
    return {names[0]: LoraWeights(weights.down, torch.cat([scale, shift]), weights.scale, weights.error)}


def _modulation(weights: LoraWeights, names: tuple[str, ...]) -> Layers:
    """Six values per channel in order; the text stream of SD 3's last block has only the two of a last normalisation."""
    last = weights.up.shape[0] == 2 * weights.down.shape[1]
    return (_swapped if last else _whole)(weights, names)
