"""Hooks on cross-attention (UNets, Anima): they read how much attention words get, and mask words outside their region.

These are hooks, since other tools replace processors (IP-Adapter, attention slicing), and every processor takes a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from mole_diffusers.patching.gating.shared_state import SharedState
from mole_diffusers.patching.hooks import ForwardHook, ForwardInput, Uncompiled
from mole_diffusers.patching.host.placement import tokens_of

MAP_TOKENS = 256  # maps are read in layers with about this many tokens: 16 x 16 in SD 1.5 at 512 pixels


def hooks(model: Any, shared: SharedState) -> Iterator[tuple[nn.Module, ForwardHook]]:
    """Hooks for every cross-attention of a model, and for the model, whose compiled blocks cannot be read."""
    reading = map_layers(model)
    around = [
        module for name, module in model.named_modules() if any(each.startswith(f"{name}.") for each in reading if name)
    ]
    yield model, Uncompiled(shared.entered, around, lambda: shared.wants_maps)
    for name, module in cross_attentions(model).items():
        yield module, CrossAttention(shared, reads_maps=name in reading)


def cross_attentions(model: Any) -> dict[str, Attention]:
    """The cross-attentions of a model by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith("attn2") and isinstance(module, Attention) and module.is_cross_attention
    }


def map_layers(model: Any) -> list[str]:
    """The cross-attentions whose maps are read: in a UNet those with the number of tokens nearest to MAP_TOKENS, in a
    transformer, which has the same number everywhere, those in the middle half of the blocks.
    """
    names = list(cross_attentions(model))
    if not hasattr(model.config, "block_out_channels"):
        return names[len(names) // 4 : max(1, 3 * len(names) // 4)]
    sizes = {name: tokens_of(name, model) for name in names}
    nearest = min((abs(math.log(size / MAP_TOKENS)) for size in sizes.values() if size), default=0.0)
    return [name for name, size in sizes.items() if size and abs(math.log(size / MAP_TOKENS)) == nearest]


@dataclass(eq=False)
class CrossAttention(ForwardHook):
    """On a cross-attention: reads how much attention words get, if its maps are read, and closes words."""

    shared: SharedState
    reads_maps: bool

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> ForwardInput | None:
        masks = self.shared.effective.binding
        if masks is None or (bound := masks.text) is None or not (bound.binds or self.shared.wants_maps):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        text = text[0] if isinstance(text, tuple) else text  # IP-Adapter passes its pictures along with the text
        if text is None or hidden.dim() != 3:
            return None
        if self.reads_maps and not torch.compiler.is_compiling() and self.shared.wants_maps:
            frames, rest = divmod(len(hidden), bound.rows)
            if frames and not rest:
                drawn = [row * frames + frame for row in bound.picture.picture_rows for frame in range(frames)]
                shares = _probabilities(module, hidden[drawn], text[drawn])
                self.shared.add_maps(shares.unflatten(0, (-1, frames)).mean(1))  # a video has one layout
        if not self.shared.effective.masks_words:
            return None
        given = kwargs.get("attention_mask")
        of_rows = bound.blocks.masks_rows
        if given is None and not of_rows and not torch.compiler.is_compiling():
            bias = bound.bias_of_heads(hidden.shape[1], hidden.shape[0], module.heads, hidden.dtype)
        else:
            bias = bound.bias(hidden.shape[1], hidden.shape[0])
        if bias is None or bias.shape[2] != text.shape[1]:
            return None
        bias = bias.to(hidden.dtype)[:, None] if of_rows else bias.to(hidden.dtype)
        return args, {**kwargs, "attention_mask": bias if given is None else given + bias}


@torch.no_grad()
def _probabilities(attention: Any, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """What the model without experts attends to, mean over heads: hidden [B, T, C] and text [B, S, D] -> [B, T, S]."""
    to_q, to_k = (getattr(layer, "base_layer", layer) for layer in (attention.to_q, attention.to_k))
    query, key = (attention.head_to_batch_dim(x) for x in (to_q(hidden), to_k(text)))  # [B heads, T or S, D]
    if attention.norm_q is not None:
        query, key = attention.norm_q(query), attention.norm_k(key)
    scores = attention.get_attention_scores(query, key)  # [B heads, T, S]
    return scores.unflatten(0, (len(hidden), -1)).mean(1)
