"""Hooks on a UNet's cross-attention: they read how much words are attended, and close them outside their region.

Hooks, since other tools replace processors (IP-Adapter, attention slicing) and every processor takes a mask.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from mole_diffusers.patching.placement import tokens_of
from mole_diffusers.patching.runtime import Runtime

MAP_TOKENS = 256  # maps are read where the picture has about so many tokens: 16 x 16 in Stable Diffusion 1.5 at 512 pixels


def hook(model: Any, runtime: Runtime, undo: ExitStack) -> None:
    """Hook every cross-attention of a UNet."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if name.endswith("attn2") and isinstance(module, Attention) and module.is_cross_attention
    }
    sizes = {name: tokens_of(name, model) for name in layers}
    nearest = min((abs(math.log(size / MAP_TOKENS)) for size in sizes.values() if size), default=0.0)
    for name, module in layers.items():
        reads = bool(sizes[name]) and abs(math.log(sizes[name] / MAP_TOKENS)) == nearest
        undo.callback(module.register_forward_pre_hook(_attend(runtime, reads), with_kwargs=True).remove)


def _attend(runtime: Runtime, reads_maps: bool) -> Any:
    def before(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        masks = runtime.masks
        if masks is None or masks.picture is None or torch.compiler.is_compiling():
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        text = text[0] if isinstance(text, tuple) else text  # IP-Adapter's pictures come beside the text
        if text is None or hidden.dim() != 3:
            return None
        if reads_maps and masks.reads_maps:
            rows = sorted(set(masks.picture.prompt_of))
            if len(hidden) == len(masks.picture.prompt_of):
                masks.add_maps(_probabilities(attention, hidden[rows], text[rows]), rows)
        bias = masks.bias(hidden.shape[1], text)
        if bias is None or len(bias) != len(hidden):
            return None
        given = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": bias if given is None else given + bias}

    return before


@torch.no_grad()
def _probabilities(attention: Any, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """What the host without experts attends to, mean over heads: hidden [B, T, C] and text [B, S, D] -> [B, T, S]."""
    to_q, to_k = (getattr(layer, "base_layer", layer) for layer in (attention.to_q, attention.to_k))
    query, key = (attention.head_to_batch_dim(x) for x in (to_q(hidden), to_k(text)))
    scores = attention.get_attention_scores(query, key)  # [B heads, T, S]
    return scores.unflatten(0, (len(hidden), -1)).mean(1)
