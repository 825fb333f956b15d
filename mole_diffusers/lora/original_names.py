"""Layer names of the original Stable Diffusion, Flux and SD 3 code -> diffusers' names, both with underscores.

The original UNet ("sgm" names; SD 1.x, SD 2.x, SDXL) numbers its blocks consecutively. Each of diffusers' blocks is two
resnets and a downsampler going down, and three resnets with the upsampler in the last going up.

The original transformers hold q, k and v (and the feed-forward of a single block) in one matrix, which diffusers splits.
"""

from __future__ import annotations

import re

import torch

from mole_diffusers.lora.expert import LoraWeights

# ---- the UNet

PER_BLOCK = 3
UNET_OUTSIDE_BLOCKS = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
MIDDLE = {"0": "mid_block_resnets_0", "1": "mid_block_attentions_0", "2": "mid_block_resnets_1"}
MIDDLE_BLOCK = re.compile(r"middle_block_([012])_(\w+)$")
NUMBERED_BLOCK = re.compile(r"(?P<way>input|output)_blocks_(?P<block>\d{1,2})_(?P<inner>\d)_(?P<rest>\w+)$")


def unet_name(layer: str) -> str:
    """The diffusers name of an original UNet layer; any other name unchanged."""
    if layer in UNET_OUTSIDE_BLOCKS:
        return UNET_OUTSIDE_BLOCKS[layer]
    if found := MIDDLE_BLOCK.match(layer):
        return f"{MIDDLE[found[1]]}_{RESNET.get(found[2], found[2])}"
    if not (found := NUMBERED_BLOCK.match(layer)):
        return layer
    down, rest = found["way"] == "input", found["rest"]
    block, index = divmod(int(found["block"]) - (1 if down else 0), PER_BLOCK)
    if down and rest == "op":
        return f"down_blocks_{block}_downsamplers_0_conv"
    if not down and rest == "conv":  # after the attention if there is one, else in its place
        return f"up_blocks_{block}_upsamplers_0_conv"
    inner = "resnets" if found["inner"] == "0" else "attentions"
    return f"{'down' if down else 'up'}_blocks_{block}_{inner}_{index}_{RESNET.get(rest, rest)}"


# ---- the transformers

HAVE_ORIGINAL_NAMES = ("Flux", "Chroma", "SD 3")  # the families whose names these are
TRANSFORMER_OUTSIDE_BLOCKS = {
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


def _with_parts(layers: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Add each part of a fused matrix as a layer of its own, as in OMI files."""
    fused = {name: targets for name, targets in layers.items() if len(targets) > 1}
    return layers | {f"{name}_{i}": (target,) for name, targets in fused.items() for i, target in enumerate(targets)}


# the layers of a block with one stream, and of each stream of a block with two
SINGLE = _with_parts({
    "linear1": ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"), "linear2": ("proj_out",),
    "modulation_lin": ("norm_linear",), "qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
})  # fmt: skip
IMAGE = _with_parts({
    "attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"), "attn_proj": ("attn_to_out_0",),
    "attn2_qkv": ("attn2_to_q", "attn2_to_k", "attn2_to_v"), "attn2_proj": ("attn2_to_out_0",),
    "mlp_0": ("ff_net_0_proj",), "mlp_2": ("ff_net_2",), "mod_lin": ("norm1_linear",),
})  # fmt: skip
TEXT = _with_parts({
    "attn_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"), "attn_proj": ("attn_to_add_out",),
    "mlp_0": ("ff_context_net_0_proj",), "mlp_2": ("ff_context_net_2",), "mod_lin": ("norm1_context_linear",),
})  # fmt: skip
OF_SD3 = {"mlp_fc1": "mlp_0", "mlp_fc2": "mlp_2", "adaLN_modulation_1": "mod_lin"}  # SD 3's names of the same layers
BLOCKS = {  # how the layers of a block begin -> what diffusers calls the block, and its layers
    r"single_blocks_(\d{1,3})_": ("single_transformer_blocks", SINGLE),
    r"double_blocks_(\d{1,3})_img_": ("transformer_blocks", IMAGE),
    r"double_blocks_(\d{1,3})_txt_": ("transformer_blocks", TEXT),
    r"joint_blocks_(\d{1,3})_x_block_": ("transformer_blocks", IMAGE),
    r"joint_blocks_(\d{1,3})_context_block_": ("transformer_blocks", TEXT),
}


LAST_NORM = "final_layer_adaLN_modulation_1"


def is_original_transformer(layer: str) -> bool:
    """Whether this is a layer name of an original transformer."""
    return _transformer_targets(layer)[0] != (layer,)


def split_fused(layer: str, weights: LoraWeights) -> dict[str, LoraWeights]:
    """A transformer layer of a file -> diffusers' layers: several for a fused matrix; other names are kept as they are."""
    targets, name = _transformer_targets(layer)
    rows, width, count = len(weights.up), weights.down.shape[1], len(targets)
    # The text stream of SD 3's last block has a last normalisation, too: two values per channel instead of six.
    is_last_norm = name == LAST_NORM or (name == "mod_lin" and rows == 2 * width)
    if count == 1 and not is_last_norm:
        return {targets[0]: weights}
    if name == "linear1":  # q, k and v are as wide as the input, and the feed-forward takes the remaining rows
        sizes, wanted = [width] * 3 + [rows - 3 * width], f"q, k, v of {width} and a feed-forward"
    else:
        count = 2 if is_last_norm else count
        sizes, wanted = [rows // count] * count, f"{count} equal parts"
    if min(sizes) <= 0 or sum(sizes) != rows:
        raise ValueError(f"{rows} rows are not {wanted}")
    parts = torch.arange(rows).split(sizes)
    if is_last_norm:  # diffusers has scale before shift there
        parts = (torch.cat(parts[::-1]),)
    return {target: weights.of_rows(part) for target, part in zip(targets, parts, strict=True)}


def _transformer_targets(layer: str) -> tuple[tuple[str, ...], str]:
    """diffusers' layer names, and the name in the original block."""
    if layer == LAST_NORM:
        return ("norm_out_linear",), layer
    for start, (block, layers) in BLOCKS.items():
        if found := re.match(start, layer):
            name = OF_SD3.get(layer[found.end() :], layer[found.end() :])
            if name in layers:
                return tuple(f"{block}_{found[1]}_{target}" for target in layers[name]), name
    return (TRANSFORMER_OUTSIDE_BLOCKS.get(layer, layer),), layer
