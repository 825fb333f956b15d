"""Where gates are in a model, and what a gate reads there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching.host.denoiser_inputs import DENOISERS
from mole_diffusers.patching.host.denoisers import TEXT_LAYERS, record

OUTSIDE_BLOCKS = ""  # the gate location of layers outside any block: resnets, time embedding, proj_in and proj_out
ENCODER_ENTRIES = ("self_attn", "SelfAttention")  # in blocks of text encoders, the module that their input enters first
TIME_WIDTH = 32  # channels of the sinusoidal time features that the network's gate reads beside the text


@dataclass(frozen=True)
class LocationDescription:
    """What one gate reads.

    - "block": what enters `module`, whenever `block` runs
    - "text": what layers of `block` read that read the text
    - "layer": what its only layer reads
    - "model": what a denoiser gets; in a text encoder what enters `module`, the first block
    """

    name: str  # the module name of the block, layer or matrix that it weighs; "" for all layers outside of blocks
    reads: Literal["block", "text", "layer", "model"]
    module: str | None
    block: str | None
    width: int  # channels C of the input
    tokens: int  # T at the model's default resolution, for flattened features; 0 if it is not fixed


def blocks(model: nn.Module, entries: Sequence[str]) -> dict[str, str]:
    """{name of a transformer block: name of the module that its input enters first}, see `Blocks.entries`."""
    return {
        name: f"{name}.{first}"
        for name, module in model.named_modules()
        if (first := next((entry for entry in entries if hasattr(module, entry)), None))
    }


def location_name(layer: str, one_gate_per: str, block_names: Iterable[str]) -> str:
    """The name of the gate location whose gate weighs `layer`, see `GateType.one_gate_per`."""
    block = _block_of(layer, block_names)
    if one_gate_per == "matrix" or (one_gate_per == "token type" and block is None):
        return layer
    if one_gate_per == "model" or block is None:
        return OUTSIDE_BLOCKS
    if one_gate_per == "token type" and layer.endswith(TEXT_LAYERS):
        return f"{block}.{TEXT_LAYERS[0]}"
    return block if one_gate_per != "layer" else ".".join([block, layer.removeprefix(f"{block}.").split(".")[0]])


def _block_of(module: str, block_names: Iterable[str]) -> str | None:
    """The block that a module is in, or that it is."""
    return next((block for block in block_names if f"{module}.".startswith(f"{block}.")), None)


def describe_location(
    name: str, one_gate_per: str, model: nn.Module, entries: Mapping[str, str], *, denoises: bool, reads_prompt: bool
) -> LocationDescription:
    """Describe the gate location with a name from `location_name`, in a denoiser or a text encoder whose `blocks` are
    `entries`.

    A gate that `reads_prompt` reads what a denoiser gets, or what enters a text encoder's block.
    """
    block = _block_of(name, entries)
    if reads_prompt and not denoises and block is not None:
        return LocationDescription(name, "block", block, block, _in_width(model.get_submodule(block)), 0)
    if reads_prompt or name == OUTSIDE_BLOCKS:
        width = text_width(model, denoises=denoises) + (TIME_WIDTH if denoises and not reads_prompt else 0)
        return LocationDescription(name, "model", None if denoises else next(iter(entries)), None, width, 0)
    width = _in_width(model.get_submodule(name))
    if one_gate_per == "matrix" or block is None:
        return LocationDescription(name, "layer", None, None, width, 0)
    if one_gate_per == "token type" and name == block:
        return LocationDescription(name, "block", block, block, width, 0)
    if one_gate_per == "token type":
        return LocationDescription(name, "text", None, block, width, 0)
    entry = entries[name] if one_gate_per == "block" else name
    return LocationDescription(name, "block", entry, name, _in_width(model.get_submodule(entry)), tokens_of(name, model))


def first_reads_its_input(location: LocationDescription, layers: Sequence[str], model: nn.Module) -> bool:
    """Whether the first to run of these layers of a block reads the picture, in as many channels as its gate does.

    Inside of a block, modules run in the order in which they are listed.
    """
    block = str(location.block)
    first = next(name for name, _ in model.get_submodule(block).named_modules(prefix=block) if name in layers)
    return record(model).blocks.token_type_of(first) != "text" and _in_width(model.get_submodule(first)) == location.width


def token_type_of(part: str, model: nn.Module, layer: str) -> str | None:
    """The tokens that a layer of a part of a pipeline reads: "encoding" in a text encoder, else see
    `Blocks.token_type_of`.
    """
    return record(model).blocks.token_type_of(layer) if part in DENOISERS else "encoding"


def _in_width(module: nn.Module) -> int:
    """The number of input channels of a module: those of its first linear or convolution layer."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            return child.in_features
        if isinstance(child, nn.Conv2d):
            return child.in_channels
    raise ValueError(f"{type(module).__name__} has no layer that an expert could gate")


def text_width(model: Any, *, denoises: bool) -> int:
    """The number of channels of the text that a denoiser reads, or of a text encoder's states."""
    if not denoises:
        return model.config.get_text_config().hidden_size
    width = getattr(model.config, record(model).text_width)
    return width if isinstance(width, int) else width[-1]


def tokens_of(name: str, model: Any) -> int:
    """The number of tokens of a block at the model's default size: halved per side at each down block, mirrored going up."""
    config = model.config
    if not hasattr(config, "block_out_channels"):
        return getattr(config, "max_position_embeddings", 0)
    depth = len(config.block_out_channels) - 1
    numbered = re.match(r"(down|up)_blocks\.(\d+)", name)
    level = depth if numbered is None else int(numbered[2])
    if numbered and numbered[1] == "up":
        level = depth - level
    if not (size := config.sample_size):  # the model is for pictures of any size
        return 0
    latent_size = size if isinstance(size, int) else size[0]
    return (latent_size >> level) ** 2


def probed(location: LocationDescription, stacks: Mapping[str, Stack]) -> list[str]:
    """The expert layers that read the gate's own input, so that their outputs are known when the gate is evaluated.

    Raises ValueError if no expert has one: the paper's input does not exist at that location.
    """
    if location.module is None:
        return [location.name]
    ends: tuple[str, ...] = ("to_q", "q_proj", "net.0.proj", "fc1")
    if not location.module.endswith("attn2"):  # cross-attention reads keys and values from the text
        ends += ("to_k", "to_v", "k_proj", "v_proj")
    names = [name for name in stacks if name.startswith(f"{location.module}.") and name.endswith(ends)]
    if not names:
        raise ValueError(
            f"inputs='experts' needs an expert layer that reads the input of {location.module}, and no expert has one; "
            f"use inputs='hidden'"
        )
    return names
