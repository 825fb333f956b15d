"""Hooks on attention that reads text and picture together: they read maps, and mask words.

They act where the model calls PyTorch's attention, so that its norms and rotary embeddings apply.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from torch import nn
from torch.overrides import TorchFunctionMode

from mole_diffusers.patching.gating.bound_text import BoundText
from mole_diffusers.patching.gating.shared_state import SharedState
from mole_diffusers.patching.hooks import AroundForward, ForwardHook, Uncompiled
from mole_diffusers.patching.host.placement import blocks

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # of PyTorch's attention, by position


def hooks(model: Any, shared: SharedState) -> Iterator[tuple[nn.Module, ForwardHook]]:
    """Hooks for the joint attention of every block of a transformer, and for the transformer, whose compiled blocks cannot
    be read. Maps are read in the middle half of the blocks.
    """
    around = list(model.modules())
    yield model, Uncompiled(shared.entered, around, lambda: shared.wants_maps or _masks_words(shared))
    entries = shared.inputs.record.blocks.entries
    layers = [model.get_submodule(f"{block}.{entries[-1]}") for block in blocks(model, entries)]
    for i, layer in enumerate(layers):
        yield layer, JointAttention(shared, reads_maps=len(layers) // 4 <= i < max(1, 3 * len(layers) // 4))


def _masks_words(shared: SharedState) -> bool:
    masks = shared.effective.binding
    return (
        shared.effective.masks_words and masks is not None and masks.text is not None and masks.text.region_masks is not None
    )


@functools.cache  # once for each backend, not in every layer and step
def _say_native(backend: str) -> None:
    warnings.warn(
        f"attention runs on PyTorch's own backend instead of {backend} where LoRAs have words or places: no other takes "
        "every mask",
        stacklevel=2,
    )


class JointAttention(AroundForward):
    """On an attention: watches PyTorch's attention while it runs, with the one implementation that takes any mask."""

    def __init__(self, shared: SharedState, *, reads_maps: bool):
        super().__init__(shared.entered)
        self.shared, self.reads_maps = shared, reads_maps

    def enter(self, module: Any, stack: ExitStack) -> None:
        if self.shared.effective.binding is None or torch.compiler.is_compiling():
            return
        masks_words, reads = _masks_words(self.shared), self.reads_maps and self.shared.wants_maps
        if not (masks_words or reads):
            return
        processor = module.processor
        chosen = getattr(processor, "_attention_backend", None)
        if (backend := chosen or _AttentionBackendRegistry.get_active_backend()[0]) != AttentionBackendName.NATIVE:
            _say_native(AttentionBackendName(backend).value)
        if chosen is not None:
            stack.callback(setattr, processor, "_attention_backend", chosen)
            processor._attention_backend = None
        stack.enter_context(attention_backend("native"))
        stack.enter_context(_WatchedAttention(self.shared, masks_words=masks_words, reads_maps=reads))


class _WatchedAttention(TorchFunctionMode):
    """`scaled_dot_product_attention` with maps read from its queries and keys, and a bias added to its logits."""

    def __init__(self, shared: SharedState, *, masks_words: bool, reads_maps: bool):
        super().__init__()
        self.shared, self.masks_words, self.reads_maps = shared, masks_words, reads_maps

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(ARGUMENTS, args, strict=False)) | (kwargs or {})
        query, key = given["query"], given["key"]  # [B, heads, S, D]
        masks = self.shared.effective.binding
        bound = None if masks is None else masks.text
        tokens = query.shape[2]
        apart = bound.apart(tokens) if bound is not None and key.shape[2] == tokens else None
        if bound is not None and apart is not None:
            picture, text = apart
            if self.reads_maps:
                mask = given.get("attn_mask")
                shown = mask[..., text] if mask is not None and mask.dtype == torch.bool else None
                self._read(bound, query[:, :, picture], key[:, :, text], shown)
            bias = bound.joint_bias(tokens, len(query)) if self.masks_words else None
            if bias is not None:
                before, bias = given.get("attn_mask"), bias.to(query.dtype)
                if before is not None:
                    bias = bias.masked_fill(~before, -torch.inf) if before.dtype == torch.bool else bias + before
                given["attn_mask"] = bias
        return func(**given)

    @torch.no_grad()
    def _read(self, bound: BoundText, query: torch.Tensor, key: torch.Tensor, shown: torch.Tensor | None) -> None:
        """The text tokens' shares in what the picture's tokens attend to: query [B, heads, T, D], key [B, heads, S, D]."""
        rows = bound.picture.picture_rows
        if len(query) != bound.rows:
            return
        heads = query.shape[1]
        total = query.new_zeros(len(rows), query.shape[2], key.shape[2])
        for head in range(heads):  # all heads at once would be as large as the full attention matrix that models avoid
            logits = query[rows, head] @ key[rows, head].transpose(1, 2) / query.shape[-1] ** 0.5
            if shown is not None:  # [B, 1, 1, S]: padding is hidden
                logits = logits.masked_fill(~shown[rows, 0], -torch.inf)
            total += logits.softmax(-1) / heads
        self.shared.add_maps(total)
