"""Clip skip as in A1111: the text encoder stops before its last layers. Many checkpoints for drawings want 2.

The argument `clip_skip` of diffusers counts one less, and does not change the negative prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CLIPTextModel

from mole_diffusers.studio.prompt_weights import text_encoders


def has_clip_skip(pipe: Any) -> bool:
    """Whether a pipeline supports clip skip. Stable Diffusion 1.x and 2.x do; models with several text encoders read fixed
    layers."""
    return [type(encoder) for encoder in text_encoders(pipe)] == [CLIPTextModel]


@contextmanager
def clip_skip(pipe: Any, count: int) -> Iterator[None]:
    """While the block runs, the text encoder stops after its `count`-th layer from the end; its final norm comes next.

    Attach LoRAs outside the block, since they need all layers. Raises ValueError if no layer would be left.
    """
    if count == 1:
        yield
        return
    stack = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder
    layers = stack.layers
    if count > len(layers):
        raise ValueError(f"clip skip is in 1..{len(layers)} for a text encoder of {len(layers)} layers, got {count}")
    try:
        stack.layers = layers[: len(layers) + 1 - count]
        yield
    finally:
        stack.layers = layers
