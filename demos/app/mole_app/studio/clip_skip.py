"""Clip skip as in A1111: the text encoder stops before its last layers. Many checkpoints for drawings want 2.

The argument `clip_skip` of diffusers counts one less, and does not change the negative prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import CLIPTextModel

from mole_diffusers import denoiser, models_of


def most_clip_skip(pipe: Any) -> int:
    """The largest clip skip of a pipeline, which is the number of layers of its text encoder.

    It is 1, so there is none, but for Stable Diffusion 1.x and 2.x: models with several text encoders read fixed layers.
    """
    kinds = [type(model) for model in models_of(pipe).values() if model is not denoiser(pipe)]
    return len(_stack(pipe).layers) if kinds == [CLIPTextModel] else 1


@contextmanager
def clip_skip(pipe: Any, count: int) -> Iterator[None]:
    """While the block runs, the text encoder stops after its `count`-th layer from the end; its final norm comes next.

    The layers after it stay in the model and pass on what they get, so a mixture may come and go meanwhile.

    Args:
        count: in 1..`most_clip_skip(pipe)`; 1 is all layers.
    """
    if count == 1:
        yield
        return
    with ExitStack() as undo:
        for layer in _stack(pipe).layers[1 - count :]:
            own = vars(layer).get("forward")  # of offloading, for one
            undo.callback(vars(layer).pop, "forward") if own is None else undo.callback(setattr, layer, "forward", own)
            layer.forward = lambda hidden, *_, **__: hidden
        yield


def _stack(pipe: Any) -> Any:
    return getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder
