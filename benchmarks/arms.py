"""The arms of a measurement: ways of having N LoRAs on one host. Each is put on a pipeline of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from benchmarks.hosts import ATTENTION
from benchmarks.settings import Files
from mole_diffusers.gates import GateConfig
from mole_diffusers.mixture import Mixture, attach

# Puts the LoRAs on a pipeline until the stack ends; what it returns replaces arguments of the denoiser's call.
Arm = Callable[[Any, Files, GateConfig, ExitStack], dict[str, torch.Tensor]]
WORDS = "bcdefghk"  # a word of one letter for each LoRA


def twin(pipe: Any, *, own: bool = False) -> Any:
    """The same pipeline with a UNet of its own that shares all weights; with `own`, all but the attention's."""
    named = pipe.unet.named_parameters()
    shared = {id(p): p for name, p in named if not (own and name.removesuffix(".weight").endswith(ATTENTION))}
    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet, shared)
    return other


def base(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """No LoRA."""
    return {}


def set_adapters(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """diffusers' own stacking: every LoRA loaded, and active with weight 1."""
    load(pipe, files)
    pipe.set_adapters(list(files), [1.0] * len(files))
    return {}


def load(pipe: Any, files: Files) -> None:
    """Load the files as diffusers does."""
    for name, path in files.items():
        pipe.load_lora_weights(str(path), adapter_name=name)


def gated(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """Gates."""
    awake(pipe, files, gates)
    return {}


def bound(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """Gates, with each LoRA on a word and a strip of the picture of its own; gives the text for the call."""
    mixture, n = awake(pipe, files, gates), len(files)
    mixture.bind({file: (WORDS[i % len(WORDS)], (i / n, 0.0, (i + 1) / n, 1.0)) for i, file in enumerate(files)})
    positive, negative, *_ = pipe.encode_prompt(" ".join(WORDS), pipe.device, 1, True)
    return {"encoder_hidden_states": torch.cat([negative, positive])}


def collapsed(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """Gates averaged over one step and folded into the weights."""
    stack.enter_context(awake(pipe, files, gates).collapsed("a", num_inference_steps=1, height=64, width=64))
    return {}


def of_family(arm: Arm, family: str) -> Arm:
    """An arm with gates of one family, whatever family the run is set to."""
    return lambda pipe, files, gates, stack: arm(pipe, files, GateConfig(family), stack)


def awake(pipe: Any, files: Files, gates: GateConfig) -> Mixture:
    """Gates that depend on what they read: untrained ones would weigh all alike."""
    mixture, generator = attach(pipe, dict(files), gates), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
    return mixture


ARMS: Mapping[str, Arm] = {
    "base": base,
    "again": base,  # the base once more: how much of a ratio is noise
    "set_adapters": set_adapters,
    **{family: of_family(gated, family) for family in ("sum", "mole", "flow")},
    **{f"bound {family}": of_family(bound, family) for family in ("sum", "mole")},
    "gated": gated,
    "collapsed": collapsed,
}


def own_pipeline(arm: str, pipe: Any) -> Any:
    """A twin for an arm, with weights of its own where the arm writes into them."""
    return twin(pipe, own=arm == "collapsed")


def entered(stack: ExitStack, arm: str, pipe: Any, files: Files, gates: GateConfig, given: Any) -> Callable[[], object]:
    """A step with an arm that is entered until the stack ends."""
    return partial(pipe.unet, **given | ARMS[arm](pipe, files, gates, stack))
