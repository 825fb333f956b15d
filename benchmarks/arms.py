"""The arms of a measurement: ways to use N LoRAs on one host. Each gets its own pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from benchmarks.hosts import ATTENTION
from benchmarks.settings import Files
from mole_diffusers.gates import GateConfig
from mole_diffusers.mixture import Mixture, attach

# An arm puts the LoRAs on a pipeline until the stack ends. It returns arguments that replace those of the denoiser's call.
Arm = Callable[[Any, Files, GateConfig, ExitStack], dict[str, torch.Tensor]]
TEXT_ENCODERS = {"text_encoder", "text_encoder_2"}
WORDS = "bcdefghk"  # a one-letter word for each LoRA


def twin(pipe: Any, *, own: bool = False) -> Any:
    """A copy of a pipeline whose UNet shares all weights with it; with `own`, all except those of the attention layers."""
    named = pipe.unet.named_parameters()
    shared = {id(p): p for name, p in named if not (own and name.removesuffix(".weight").endswith(ATTENTION))}
    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet, shared)
    return other


def base(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """The base without LoRAs."""
    return {}


def set_adapters(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """diffusers' own stacking: every LoRA is loaded, and active with weight 1."""
    load(pipe, files)
    pipe.set_adapters(list(files), [1.0] * len(files))
    return {}


def load(pipe: Any, files: Files) -> None:
    """Load the files with diffusers."""
    for name, path in files.items():
        pipe.load_lora_weights(str(path), adapter_name=name)


class Products(nn.Module):
    """A linear layer W with what stacked LoRAs at weight 1 compute, and nothing else: y = W x + B (A x)."""

    def __init__(self, base: nn.Linear, down: torch.Tensor, up: torch.Tensor):
        super().__init__()
        self.base, self.down, self.up = base, nn.Parameter(down), nn.Parameter(up)  # A [R, Cin], B [Cout, R]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, Cin] -> [B, T, Cout]."""
        rows = x.flatten(0, 1)
        y = F.linear(rows, self.base.weight, self.base.bias)
        return torch.addmm(y, F.linear(rows, self.down), self.up.T).view(*x.shape[:2], -1)


def products(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """The products of A and B alone: the least that LoRAs beside the weights can cost."""
    loras = [load_file(path) for path in files.values()]
    for name, layer in list(pipe.unet.named_modules()):
        if name.endswith(ATTENTION):
            down, up = ([lora[f"unet.{name}.lora_{half}.weight"].to(layer.weight) for lora in loras] for half in "AB")
            parent, _, leaf = name.rpartition(".")
            setattr(pipe.unet.get_submodule(parent), leaf, Products(layer, torch.cat(down), torch.cat(up, 1)))
    return {}


def gated(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """A mixture with gates, in a call of its pipeline."""
    stack.enter_context(awake(pipe, files, gates).drawing())
    return {}


def bound(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """A mixture with each LoRA bound to a word and a strip of the picture. Returns the text for the call."""
    mixture, n = awake(pipe, files, gates), len(files)
    mixture.bind({file: (WORDS[i % len(WORDS)], (i / n, 0.0, (i + 1) / n, 1.0)) for i, file in enumerate(files)})
    stack.enter_context(mixture.drawing())
    positive, negative, *_ = pipe.encode_prompt(" ".join(WORDS), pipe.device, 1, True)
    return {"encoder_hidden_states": torch.cat([negative, positive])}


def two_named(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """A mixture of which only the first two act, as if a prompt named no others."""
    mixture = awake(pipe, files, gates)
    stack.enter_context(mixture.only(*list(files)[:2]))
    stack.enter_context(mixture.drawing())
    return {}


def collapsed(pipe: Any, files: Files, gates: GateConfig, stack: ExitStack) -> dict[str, torch.Tensor]:
    """A mixture whose gates are averaged over one step and folded into the weights."""
    stack.enter_context(awake(pipe, files, gates).collapsed("a", num_inference_steps=1, height=64, width=64))
    return {}


def of_gate_type(arm: Arm, gate_type: str) -> Arm:
    """The arm with gates of one type, whatever the settings say."""
    return lambda pipe, files, gates, stack: arm(pipe, files, GateConfig(gate_type), stack)


def awake(pipe: Any, files: Files, gates: GateConfig) -> Mixture:
    """Attach with gates that depend on their input. Untrained gates would weigh all LoRAs the same."""
    mixture, generator = attach(pipe, dict(files), gates), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
    return mixture


ARMS: Mapping[str, Arm] = {
    "base": base,
    "again": base,  # the base once more, to show how much of a ratio is noise
    "set_adapters": set_adapters,
    "products": products,
    **{gate_type: of_gate_type(gated, gate_type) for gate_type in ("sum", "mole", "flow", "factors")},
    **{f"bound {gate_type}": of_gate_type(bound, gate_type) for gate_type in ("sum", "mole")},
    "gated": gated,
    "two named": two_named,
    "collapsed": collapsed,
}


def own_pipeline(arm: str, pipe: Any) -> Any:
    """A twin for an arm, with its own weights if the arm writes into them."""
    return twin(pipe, own=arm == "collapsed")


def entered(stack: ExitStack, arm: str, pipe: Any, files: Files, gates: GateConfig, given: Any) -> Callable[[], object]:
    """A function that runs one step with an arm. The arm stays entered until the stack ends."""
    return partial(pipe.unet, **given | ARMS[arm](pipe, files, gates, stack))


def picture(arm: str, pipe: Any, files: Files, gates: GateConfig, call: Mapping[str, Any]) -> Callable[[], object]:
    """A function that draws a picture's latents with an arm, in a whole call of the pipeline with these arguments."""
    for name in TEXT_ENCODERS & pipe.components.keys():
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))  # which other arms have hooks on
    with ExitStack() as stack:  # what holds only for steps outside of calls ends here
        ARMS[arm](pipe, files, gates, stack)
    return partial(pipe, " ".join(WORDS), output_type="latent", **call)
