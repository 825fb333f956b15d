"""Experts -> pairs by layer, and a merge back to one Expert."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from mole_diffusers.lora import Expert, LoraWeights, layer_key
from mole_diffusers.lora.expert import FileNotes, joined_embeddings
from mole_diffusers.lora.own_words import own_words
from mole_diffusers.merging.factors import Merged, Pair

WeightedExperts = Mapping[str, tuple[Expert, float]]  # name -> expert and strength


def layers_of(experts: WeightedExperts) -> dict[str, list[Pair | None]]:
    """Layer key "unet.LAYER" -> one float64 pair per expert, with its strength in the scale.

    Raises ValueError if experts are for different models: known families differ, or sizes of a layer; and if one is DoRA.
    """
    if of_base := [name for name, (expert, _) in experts.items() if expert.needs_base]:
        raise ValueError(
            f"expert {of_base[0]!r} is DoRA, whose change depends on the base's own weights; it cannot be merged"
        )
    families = {name: expert.base for name, (expert, _) in experts.items() if expert.base != "unknown"}
    if len(set(families.values())) > 1:
        raise ValueError(f"the experts do not fit one model: {', '.join(f'{n!r} is for {f}' for n, f in families.items())}")
    found = [(weights_by_key(expert), strength) for expert, strength in experts.values()]
    keys = dict.fromkeys(key for own, _ in found for key in own)
    layers = {key: [_pair(own[key], strength) if key in own else None for own, strength in found] for key in keys}
    for key, layer in layers.items():
        shapes = {n: (p.up.shape[0], p.down.shape[1]) for n, p in zip(experts, layer, strict=True) if p is not None}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the experts do not fit one model: [Cout, Cin] of layer {key!r} is {shapes}")
    return layers


def merge_key(layer: str) -> str:
    """ "unet.down_blocks.0..." -> the layer's key in `layers_of`."""
    part, _, name = layer.partition(".")
    return f"{part}.{layer_key(name)}"


def weights_by_key(expert: Expert) -> dict[str, LoraWeights]:
    """Layer key "unet.LAYER" -> an expert's weights."""
    return {f"{part}.{layer}": weights for part, layers in expert.layers.items() for layer, weights in layers.items()}


def _pair(weights: LoraWeights, strength: float) -> Pair:
    return Pair(weights.down.double().flatten(1), weights.up.double().flatten(1), weights.scale * strength)


def as_expert(merged: Merged, experts: WeightedExperts, *, name: str, metadata: Mapping[str, str]) -> Expert:
    """A merge as one ordinary LoRA in fp32, in the shapes of their layers, with their trigger words and embeddings."""
    parts: dict[str, dict[str, LoraWeights]] = {}
    found = [weights_by_key(expert) for expert, _ in experts.values()]
    for key, pair in merged.items():
        part, _, layer = key.partition(".")
        inputs = max((own[key].down.shape[1:] for own in found if key in own), key=len)
        up = (pair.up * pair.scale).float().reshape(-1, pair.rank, *(1,) * (len(inputs) - 1))
        parts.setdefault(part, {})[layer] = LoraWeights(pair.down.float().reshape(-1, *inputs), up, 1.0)
    alone = {name: expert for name, (expert, _) in experts.items()}
    families = [expert.base for expert, _ in experts.values() if expert.base != "unknown"]
    return Expert(
        name=name,
        layers=parts,
        format="diffusers",
        base=next(iter(families), "unknown"),
        triggers=tuple(dict.fromkeys(word for own in own_words(alone).values() for word in own.words)),
        source=f"merge of {', '.join(experts)}",
        sha256=_hash(merged),
        metadata=dict(metadata),
        embeddings=joined_embeddings(alone.values()),
        notes=FileNotes(file_names={key: n for expert in alone.values() for key, n in expert.notes.file_names.items()}),
    )


def _hash(merged: Merged) -> str:
    digest = hashlib.sha256()
    for key in sorted(merged):
        digest.update(key.encode())
        for half in merged[key][:2]:
            digest.update(half.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
