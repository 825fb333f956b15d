"""Layer names of the original Stable Diffusion UNet ("sgm" names) -> diffusers' names, both with underscores.

The original numbers its blocks through; each of diffusers' blocks is two resnets and a downsampler going down, three
resnets with the upsampler in the last going up. That holds for SD 1.x, SD 2.x and SDXL.
"""

from __future__ import annotations

import re

PER_BLOCK = 3
OUTSIDE = {
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
NUMBERED = re.compile(r"(?P<way>input_blocks|output_blocks)_(?P<block>\d{1,2})_(?P<inner>\d)_(?P<rest>\w+)$")


def from_sgm(layer: str) -> str:
    """The diffusers name of an sgm layer; any other name as it is."""
    if layer in OUTSIDE:
        return OUTSIDE[layer]
    if found := re.match(r"middle_block_([012])_(\w+)$", layer):
        return f"{MIDDLE[found[1]]}_{RESNET.get(found[2], found[2])}"
    if found := NUMBERED.match(layer):
        return (_down if found["way"] == "input_blocks" else _up)(int(found["block"]), found["inner"], found["rest"])
    return layer


def _down(block: int, inner: str, rest: str) -> str:
    block, index = divmod(block - 1, PER_BLOCK)
    if rest == "op":
        return f"down_blocks_{block}_downsamplers_0_conv"
    return f"down_blocks_{block}_{_inner(inner)}_{index}_{RESNET.get(rest, rest)}"


def _up(block: int, inner: str, rest: str) -> str:
    block, index = divmod(block, PER_BLOCK)
    if rest == "conv":  # behind the attention where there is one, else in its place
        return f"up_blocks_{block}_upsamplers_0_conv"
    return f"up_blocks_{block}_{_inner(inner)}_{index}_{RESNET.get(rest, rest)}"


def _inner(number: str) -> str:
    return "resnets" if number == "0" else "attentions"
