"""Average gates over a prompt and fold them away: into the model's own weights, or into one ordinary LoRA."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from mole_diffusers import functional
from mole_diffusers.lora import LoraWeights
from mole_diffusers.patching.gating.decision import Decision, Present
from mole_diffusers.patching.host.denoiser_inputs import denoiser, is_one_graph
from mole_diffusers.patching.host.denoisers import record
from mole_diffusers.patching.install.component import Component
from mole_diffusers.patching.undo import undoing

# (gate location, present experts) -> [N], or [R] of gates per rank
LocationWeights = Mapping[tuple[str, Present], torch.Tensor]
Folded = dict[str, dict[str, LoraWeights]]  # component -> {module name in the model: one LoRA's weights}


class Averages:
    """A listener: each gate's weights averaged over calls, batch rows and tokens."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, Present], tuple[torch.Tensor, int]] = {}

    def __call__(self, decision: Decision) -> None:
        weights = decision.applied.detach().float()
        key = decision.name, decision.present
        total, count = self._sums.get(key, (torch.zeros(()), 0))
        self._sums[key] = (total.to(weights.device) + weights.reshape(-1, weights.shape[-1]).mean(0), count + 1)

    @property
    def weights(self) -> LocationWeights:
        return {key: total / count for key, (total, count) in self._sums.items()}


def evaluate_gates(pipe: Any, components: Sequence[Component], prompt: str | Sequence[str] | None, **call: Any) -> None:
    """Evaluate every gate as cheaply as possible: without a prompt if it reads nothing, by encoding if it reads the
    text, else by drawing. Gates that read the prompt read it alone, without the empty prompt of guidance, unless `call`
    says otherwise.

    Raises ValueError if a gate needs an input and there is no prompt, or weighs outputs of blocks.
    """
    if components[0].gate_type.mixes_outputs:
        raise ValueError("gates that weigh outputs of blocks cannot be folded: no weights of layers give the same")
    if components[0].gate_type.reads_prompt and "guidance_scale" in inspect.signature(pipe.__call__).parameters:
        call = {"guidance_scale": record(denoiser(pipe)).pipelines.unguided, **call}
    if prompt is None or reads_nothing(components):
        for component in components:
            component.evaluate_input_free()
    elif all(component.step_invariant for component in components) and not is_one_graph(pipe):
        _encode(pipe, components, prompt, **call)
    else:
        _draw_latents(pipe, prompt, **call)


def reads_nothing(components: Sequence[Component]) -> bool:
    """Whether all weights are known without a prompt."""
    shared = components[0].shared
    masks = shared.effective.binding
    reads_text = shared.settings.rows.now is not None or (masks is not None and masks.reader.has_words)
    return all(component.input_free for component in components) and not reads_text


class _EvaluatedError(Exception):
    """Raised once all gates are evaluated; the picture is not needed."""


def _encode(pipe: Any, components: Sequence[Component], prompt: str | Sequence[str], **call: Any) -> None:
    """Run the pipeline up to the denoiser's first layer. By then its weights are on their device."""

    def evaluate(*_: Any) -> None:
        for component in components:
            if component.input_free:  # the prompt decides which experts are present
                component.evaluate_input_free()
            else:
                component.evaluate_deferred()
        raise _EvaluatedError

    model = denoiser(pipe)
    with undoing() as undo:
        for module in model.modules():
            if isinstance(module, Attention):  # PAG could not restore its processors, as the call is stopped
                undo.callback(setattr, module, "processor", module.processor)
        for child in model.children():
            undo.before_forward(child, evaluate)
        try:
            _draw_latents(pipe, prompt, **call)
        except _EvaluatedError:
            pipe.maybe_free_model_hooks()


@torch.no_grad()
def _draw_latents(pipe: Any, prompt: str | Sequence[str], **call: Any) -> None:
    """Run the pipeline without decoding, 10 steps from seed 0 unless `call` says otherwise."""
    generator = torch.Generator().manual_seed(0)
    pipe(prompt, **{"num_inference_steps": 10, "generator": generator, "output_type": "latent", **call})


def one_lora(components: Iterable[Component], weights: LocationWeights) -> tuple[Folded, set[int]]:
    """All experts, each at its gate location's weight, as one LoRA of summed rank, and the columns of the experts that are
    in it.

    Weights of 0 are left out, and layers without a weight: they did not run.
    """
    layers: Folded = {}
    acting: set[int] = set()
    for component in components:
        for name, stack in component.stacks.items():
            location = component.location_of[name]
            if (location.name, stack.present) not in weights:
                continue
            factor = weights[location.name, stack.present].cpu()
            if location.spans_blocks and (plan := component.shared.settings.plan.now) is not None:
                factor = factor * torch.tensor(plan.block(f"{component.name}.{name}"))  # [N]
            factor = factor if location.gate.ranked else factor[stack.expert_index]  # [R]
            if (kept := factor != 0).any():
                up = stack.up[:, kept] * factor[kept].reshape(1, -1, *(1,) * (stack.up.dim() - 2))
                layers.setdefault(component.name, {})[name] = LoraWeights(stack.down[kept], up, 1.0)
                acting.update(stack.expert_index[kept].tolist())
    return layers, acting


def truncated(layers: Folded, rank: int) -> tuple[Folded, float]:
    """The nearest LoRA of at most `rank` per layer (Eckart-Young), and its error |dW - dW'| / |dW| over all layers."""
    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be 1 or more, got {rank}")
    small: Folded = {}
    lost = whole = 0.0
    for component, modules in layers.items():
        for name, weights in modules.items():
            down, up, values = functional.low_rank(weights.down, weights.up * weights.scale, rank)
            small.setdefault(component, {})[name] = LoraWeights(down, up, 1.0)
            lost, whole = lost + values[rank:].square().sum().item(), whole + values.square().sum().item()
    return small, (lost / whole) ** 0.5 if whole else 0.0


@contextmanager
def folded(components: Iterable[Component], layers: Folded) -> Iterator[None]:
    """Add `layers` in place to the weights of `components` while the block runs, then restore the same bits.

    Raises ValueError for a layer whose weight cannot be changed: quantised, or not loaded.
    """
    with undoing() as undo:
        for component in components:
            for name, lora in layers.get(component.name, {}).items():
                weight = _writable(component.model.get_submodule(name), f"{component.name}.{name}")
                undo.callback(weight.copy_, weight.clone())
                change = LoraWeights(lora.down.to(weight.device), lora.up.to(weight.device), lora.scale).delta()
                weight.copy_(weight.float() + change)
        yield


def _writable(module: Any, name: str) -> torch.Tensor:
    weight = getattr(module, "base_layer", module).weight.data
    packed = type(weight) is not torch.Tensor or not weight.is_floating_point() or weight.element_size() < 2
    if packed or weight.is_meta:
        raise ValueError(
            f"the weight of {name} ({weight.dtype} on {weight.device}) cannot take the experts: it is quantised or "
            f"offloaded; keep the gates, or fold before that"
        )
    return weight
