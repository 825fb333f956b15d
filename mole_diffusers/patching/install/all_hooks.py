"""The hooks of a mixture, in the order in which they run on a module that has several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from mole_diffusers.patching.gating import cross_attention, joint_attention
from mole_diffusers.patching.gating.prompt_tokens import TextHook
from mole_diffusers.patching.gating.sampling import Sampling, StepHook
from mole_diffusers.patching.hooks import ForwardHook
from mole_diffusers.patching.install.component import Component


def all_hooks(
    denoiser: Any,
    encoders: Mapping[str, nn.Module],
    parts: Sequence[Component],
    sampling: Sampling,
    is_off: Callable[[float], bool],
) -> Iterator[tuple[nn.Module, ForwardHook]]:
    """Each hook with its module.

    Args:
        encoders: the text encoders, by their names in the pipeline.
        parts: the models with experts.
        is_off: whether no expert acts in a call of the denoiser, given the scale of LoRAs in it.
    """
    # Where sampling is and what texts say: all others need it, also the gate of the denoiser as a whole.
    yield denoiser, StepHook(sampling, is_off)
    for name, encoder in encoders.items():
        yield encoder, TextHook(name, sampling.tokens, sampling.inputs.record.text_layers, sampling.on_text)
    # Attention that is read or closed must not be compiled in this call.
    attention = joint_attention if sampling.inputs.record.blocks.is_joint else cross_attention
    yield from attention.hooks(denoiser, sampling)
    # What gates read: first what enters the denoiser, then what enters each block and each place in it.
    for part in parts:
        yield from part.hooks()
