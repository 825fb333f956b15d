"""Experts -> stacks: for each layer that any expert changes, all experts concatenated in one pair of matrices."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mole_diffusers.lora import Expert, LoraWeights, check_family, layer_key
from mole_diffusers.lora.algorithms import check_largest
from mole_diffusers.lora.dora import on_base
from mole_diffusers.lora.families import MODEL_FAMILIES
from mole_diffusers.safe_files import RefusedFileError

SHARE = 0.9  # of an expert's layers that a pipeline must have


@dataclass(frozen=True)
class Stack:
    """All experts' weights for one layer of the model: y = W x + up (g[segment] * (down x)).

    The matrices are concatenated on each access, in fp32, so that the experts are not in memory twice.
    """

    rows: tuple[LoraWeights | None, ...]  # [N], None if an expert lacks the layer
    inner: tuple[int, ...]  # shape of a row of the host's weight: (Cin,) or (Cin, k, k)
    out: int  # Cout

    @property
    def down(self) -> torch.Tensor:
        """[R, Cin] or [R, Cin, k, k], alpha / r folded in."""
        return torch.cat([(w.down.float() * w.scale).reshape(w.rank, *self.inner) for w in self.rows if w is not None])

    @property
    def up(self) -> torch.Tensor:
        """[Cout, R] or [Cout, R, 1, 1]."""
        ones = (1,) * (len(self.inner) - 1)
        return torch.cat([w.up.float().reshape(-1, w.rank, *ones) for w in self.rows if w is not None], 1)

    @property
    def ranks(self) -> tuple[int, ...]:
        """[N], 0 if an expert lacks the layer."""
        return tuple(w.rank if w is not None else 0 for w in self.rows)

    @property
    def expert_index(self) -> torch.Tensor:
        """[R] -> index of the expert that each rank belongs to."""
        return torch.repeat_interleave(torch.tensor(self.ranks))

    @property
    def present(self) -> tuple[bool, ...]:
        """[N]: which experts have this layer."""
        return tuple(r > 0 for r in self.ranks)

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return sum(4 * (w.down.numel() + w.up.numel()) for w in self.rows if w is not None)

    def of(self, experts: Sequence[bool]) -> Stack:
        """Only the ranks of these experts, [N]. A layer that none of them has keeps one rank of zeros."""
        rows = [w if kept else None for w, kept in zip(self.rows, experts, strict=True)]
        if not any(rows):
            first = next(i for i, w in enumerate(self.rows) if w is not None)
            rows[first] = LoraWeights(torch.zeros(1, *self.inner), torch.zeros(self.out, 1), 1.0)
        return replace(self, rows=tuple(rows))


@dataclass(frozen=True)
class HostMatch:
    """How one expert's layers match a pipeline's."""

    about: str  # the expert, for error messages
    layers: dict[str, dict[str, LoraWeights]]  # component -> {module name in the host: weights}
    unmatched: dict[str, str]  # layer key, component first -> why the host has no such layer


def match(expert: Expert, hosts: Mapping[str, nn.Module]) -> HostMatch:
    """Find the module of the pipeline for every layer of `expert`.

    Args:
        hosts: component name -> model, as a pipeline has them.

    Raises:
        RefusedFileError: the expert is for another model family, a layer's shape does not fit the model (the message
            names expert, layer and both shapes), a layer gets tokens of all pictures in an unknown order, its numbers
            would overflow in half precision, or no layer matched.
    """
    about = f"expert {expert.name!r} ({expert.source}, {expert.base})"
    try:
        check_family(expert.base, hosts)
    except ValueError as error:
        raise RefusedFileError(f"{about}: {error}") from None
    found: dict[str, dict[str, LoraWeights]] = {}
    unmatched: dict[str, str] = {}
    for component, layers in expert.layers.items():
        if (host := hosts.get(component)) is None:
            unmatched |= {f"{component}.{key}": f"there is no {component}" for key in layers}
            continue
        modules, kinds = modules_by_key(host), {layer_key(name): type(m).__name__ for name, m in host.named_modules()}
        for key, weights in layers.items():
            if key not in modules:
                has = f"has a {kinds[key]} there, which takes no LoRA" if key in kinds else "has no such layer"
                unmatched[f"{component}.{key}"] = f"the {component} {has}"
                continue
            name, module = modules[key]
            if ".experts." in name:
                raise RefusedFileError(
                    f"{about}: layer '{component}.{name}' gets single tokens of all pictures, which the model sends to one "
                    "of several such layers, so no gate and no place is known there; leave these layers out of the file"
                )
            _check_fits(about, f"{component}.{name}", weights, module)
            found.setdefault(component, {})[name] = weights
    if not found:
        key, why = next(iter(unmatched.items()))
        raise RefusedFileError(f"{about}: none of its {len(unmatched)} layers is in this pipeline, {key} since {why}")
    return HostMatch(about, found, unmatched)


def check_share(expert: Expert, unmatched: Collection[str], hosts: Mapping[str, nn.Module]) -> None:
    """Raises RefusedFileError if the models that the pipeline has lack more than a tenth of an expert's layers for them."""
    keys = [f"{component}.{key}" for component, layers in expert.layers.items() if component in hosts for key in layers]
    if (fitting := len(set(keys) - set(unmatched))) < SHARE * len(keys):
        like = expert.base if expert.base in MODEL_FAMILIES else "another model"
        raise RefusedFileError(
            f"expert {expert.name!r} ({expert.source}, {expert.base}): the pipeline has only {fitting} of its {len(keys)} "
            f"layers, so it looks like a LoRA for {like}, of another size; allow_missing_layers=True uses those that fit"
        )


def modules_by_key(host: nn.Module) -> dict[str, tuple[str, Any]]:
    """{layer key: (module name, module)} of every layer that can have a LoRA, unwrapped from peft's own layers."""
    layers: dict[str, tuple[str, Any]] = {}
    for name, module in host.named_modules():
        module = getattr(module, "base_layer", module)
        if isinstance(module, nn.Linear | nn.Conv2d) and ".base_layer" not in name and ".lora_" not in name:
            layers[layer_key(name)] = (name, module)
    return layers


def _shape(module: Any) -> tuple[int, ...]:
    """[Cout, Cin] or [Cout, Cin, k, k] of a layer, even if its weight is packed (quantised)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels // module.groups, *module.kernel_size


def _check_fits(about: str, layer: str, weights: LoraWeights, module: Any) -> None:
    """Raises RefusedFileError if a layer's shape or numbers do not fit those of the model."""
    host, down, up = _shape(module), tuple(weights.down.shape), tuple(weights.up.shape)
    # A 1 x 1 convolution and a linear layer have the same matrix; both are saved in either shape. LoHa and LoKr store
    # a convolution's channels and kernel as one axis.
    inner = math.prod(host[1:])
    fits = up[0] == host[0] and math.prod(down[1:]) == inner and (len(down) == 2 or down[2:] == (host[2:] or (1, 1)))
    if not fits:
        raise RefusedFileError(
            f"{about} does not fit layer {layer}: "
            f"the host's weight is {list(host)}, the LoRA's down is {list(down)} and up is {list(up)}"
        )
    _check_numbers(about, layer, weights, module)


def _check_numbers(about: str, layer: str, weights: LoraWeights, module: Any) -> None:
    if module.weight.dtype == torch.float16 and (largest := weights.largest()) > torch.finfo(torch.float16).max:
        raise RefusedFileError(
            f"{about}: the numbers of layer {layer} go up to {largest:.2g}, which float16 cannot hold; use the pipeline in "
            f"bfloat16 or float32"
        )


def stack_all(matches: Sequence[HostMatch], hosts: Mapping[str, nn.Module]) -> dict[str, dict[str, Stack]]:
    """component -> {module name: Stack} for every layer that any expert has, in the model's order.

    Raises RefusedFileError if an expert is DoRA and the base's own weights are packed or elsewhere.
    """
    stacks: dict[str, dict[str, Stack]] = {}
    for component, host in hosts.items():
        for name, module in modules_by_key(host).values():
            rows = tuple(_on_base(m, component, name, module) for m in matches)
            if any(rows):
                stacks.setdefault(component, {})[name] = Stack(rows, _shape(module)[1:], _shape(module)[0])
    return stacks


def _on_base(match: HostMatch, component: str, name: str, module: Any) -> LoraWeights | None:
    """An expert's weights for a layer as up @ down, if it has the layer."""
    weights = match.layers.get(component, {}).get(name)
    if weights is None or weights.magnitude is None:
        return weights
    base, about = module.weight, f"{match.about}: layer {component}.{name} is DoRA, whose change"
    if type(base) is not nn.Parameter or not base.is_floating_point() or base.shape != _shape(module):
        raise RefusedFileError(f"{about} depends on the base's own weights, and they are quantised")
    if base.is_meta:
        raise RefusedFileError(f"{about} depends on the base's own weights, and they are offloaded; attach it before that")
    try:
        made = on_base(weights, weights.magnitude, base)
        check_largest(made)
    except ValueError as error:
        raise RefusedFileError(f"{match.about}: layer {component}.{name}: {error}") from None
    _check_numbers(match.about, f"{component}.{name}", made, module)
    return made
