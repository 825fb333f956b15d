"""Layers of a file that a denoiser has under other names, by diffusers' own conversion of the files for a pipeline.

diffusers converts a file as a whole, and drops layers and alphas on the way. So it is given a probe instead of the file:
for each layer a pair of rank 1, whose numbers say which layer it is and which row. What becomes of the probe tells where
each row goes. The weights themselves stay here, with each layer's own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import nn

from mole_diffusers.lora.expert import Expert, LoraWeights
from mole_diffusers.lora.families import family_of, fits
from mole_diffusers.lora.keys import parse_key
from mole_diffusers.lora.stacking import modules_by_key
from mole_diffusers.safe_files import RefusedFileError

Convert = Callable[[dict[str, torch.Tensor]], Any]  # a pipeline's `lora_state_dict`


class KeyForm(NamedTuple):
    """How the keys of a file are written. Converters know a trainer's layers by one of these."""

    prefix: str
    down: str
    up: str
    is_flat: bool  # "_" for each dot, and an alpha for each layer


FORMS = (  # ai-toolkit's and ComfyUI's, and kohya's
    KeyForm("diffusion_model.", "lora_A", "lora_B", is_flat=False),
    KeyForm("lora_unet_", "lora_down", "lora_up", is_flat=True),
)


class HostRows(NamedTuple):
    """The rows of the weight of a file's layer that make up a layer of a denoiser."""

    layer: str  # the denoiser's layer key
    rows: torch.Tensor  # [Cout] of the denoiser's layer


def with_host_names(expert: Expert, pipe: Any, hosts: Mapping[str, nn.Module]) -> Expert:
    """An expert with the names of a pipeline for those of its layers that the transformer has under other names.

    Args:
        hosts: component name -> model, as the pipeline has them.

    Raises RefusedFileError if the file has a layer twice, under both names.
    """
    model, layers, family = hosts.get("transformer"), expert.layers.get("transformer", {}), family_of(hosts)
    if not isinstance(pipe, LoraBaseMixin) or model is None or (family is not None and not fits(expert.base, family)):
        return expert
    if (known := set(modules_by_key(model))) >= layers.keys():
        return expert
    names = {key: expert.notes.file_names.get(f"transformer.{key}", key) for key in layers if key not in known}
    convert: Convert = pipe.lora_state_dict  # type: ignore[attr-defined]  # of each class that loads LoRAs
    placed = host_layers({name: len(layers[key].up) for key, name in names.items()}, convert)
    if not (found := {name: rows for name, rows in placed.items() if all(each.layer in known for each in rows)}):
        return expert
    renamed: dict[str, LoraWeights] = {}
    for key, weights in layers.items():
        parts = {rows.layer: weights.of_rows(rows.rows) for rows in found.get(names.get(key, ""), ())} or {key: weights}
        if twice := sorted(set(parts) & set(renamed)):
            about = f"expert {expert.name!r} ({expert.source}, {expert.base})"
            raise RefusedFileError(f"{about}: layer {f'transformer.{twice[0]}'!r} is there twice under different keys")
        renamed |= parts
    return replace(expert, layers={**expert.layers, "transformer": renamed})


def host_layers(layers: Mapping[str, int], convert: Convert) -> dict[str, list[HostRows]]:
    """Where the rows of a transformer's layers go.

    Args:
        layers: name in the file -> rows of its weight.

    Returns:
        The same names, without those that the conversion does not know or keeps only in part -> the denoiser's layers.
    """
    found: dict[str, list[HostRows]] = {}
    for form in FORMS:
        left = {name: rows for name, rows in layers.items() if name not in found}
        if left and (form.is_flat or any("." in name for name in layers)):
            found |= _converted(left, form, convert)
    return found


def _converted(layers: Mapping[str, int], form: KeyForm, convert: Convert) -> dict[str, list[HostRows]]:
    """The layers of which every row has a place in what becomes of their probe."""
    names = list(layers)
    try:
        converted = convert(_probe(layers, form))
    except Exception:  # whatever a converter meets where it does not know a layer
        parts = [names[: len(names) // 2], names[len(names) // 2 :]] if len(names) > 1 else []
        return {k: v for part in parts for k, v in _converted({n: layers[n] for n in part}, form, convert).items()}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in converted.items():
        with suppress(ValueError):
            if (key := parse_key(name)).component == "transformer":
                pairs.setdefault(key.layer, {})[key.role] = tensor
    places: dict[str, list[HostRows]] = {}
    for layer, pair in pairs.items():
        if pair.keys() == {"down", "up"}:
            places.setdefault(names[int(pair["down"].item())], []).append(HostRows(layer, pair["up"][:, 0].long()))
    return {name: rows for name, rows in places.items() if len(torch.cat([r.rows for r in rows]).unique()) == layers[name]}


def _probe(layers: Mapping[str, int], form: KeyForm) -> dict[str, torch.Tensor]:
    tensors = {}
    for place, (name, rows) in enumerate(layers.items()):
        stem = form.prefix + (name.replace(".", "_") if form.is_flat else name)
        tensors[f"{stem}.{form.down}.weight"] = torch.full((1, 1), float(place))
        tensors[f"{stem}.{form.up}.weight"] = torch.arange(float(rows))[:, None]
        if form.is_flat:
            tensors[f"{stem}.alpha"] = torch.ones(())
    return tensors
