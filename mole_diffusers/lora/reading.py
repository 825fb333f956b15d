"""A LoRA file -> Expert. Everything is checked here; what comes out can be attached without another look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from mole_diffusers.lora.algorithms import layer_weights, one_number
from mole_diffusers.lora.expert import Expert, LoraWeights
from mole_diffusers.lora.families import base_of
from mole_diffusers.lora.keys import alongside, of_flux, understood
from mole_diffusers.lora.metadata import Scaling, config_beside, note_beside, scalings, stated_base, triggers
from mole_diffusers.lora.safe_files import RefusedFileError, read_safetensors
from mole_diffusers.lora.transformer_names import split

TOLERANCE = 0.01


def read_expert(
    path: str | Path, name: str | None = None, *, tolerance: float = TOLERANCE, drop_nonfinite: bool = False
) -> Expert:
    """Read one LoRA file. Safetensors only; the content decides, not the suffix.

    Args:
        tolerance: the relative error that LoHa and LoKr layers may be cut to a lower rank with; 0 keeps all. Each
            layer's own is in its `error`.
        drop_nonfinite: leave out layers with NaN or infinite values instead of refusing the file; `left_out` names them.

    Raises:
        FileNotFoundError: no such file.
        RefusedFileError: what `safe_files` refuses; no LoRA keys, an unsupported algorithm, a missing or mismatched
            pair, an absurd shape, a value that is not finite or absurdly large, a PEFT config, in the header or beside
            adapter_model.safetensors, that is broken. The message names the file and the layer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file at {path}")
    contents = read_safetensors(path)
    try:
        reader = _Reader(scalings(contents.metadata, config_beside(path)), tolerance, drop_nonfinite)
        reader.read(contents.tensors)
    except ValueError as error:
        raise RefusedFileError(f"{path}: {error}") from None
    return Expert(
        name=name or path.stem,
        layers=reader.layers,
        format=reader.forms.most_common(1)[0][0],
        base=base_of(reader.layers, stated_base(contents.metadata)),
        triggers=triggers(contents.metadata, note_beside(path)),
        source=str(path),
        sha256=contents.sha256,
        metadata=contents.metadata,
        algorithms=dict(reader.algorithms),
        left_out=reader.left_out,
    )


@dataclass
class _Reader:
    """The layers of one file as they come together."""

    scalings: Mapping[str, Scaling]  # part -> of the layers that state no alpha of their own
    tolerance: float
    drop_nonfinite: bool
    layers: dict[str, dict[str, LoraWeights]] = field(default_factory=dict)
    forms: Counter[str] = field(default_factory=Counter)
    algorithms: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Group the tensors by layer, then make each layer's weights."""
        for (part, layer), roles in self._grouped(tensors).items():
            if not self._finite(f"{part}.{layer}", roles):
                continue
            alpha = roles.pop("alpha", None)
            try:
                scaling = Scaling(one_number(alpha)) if alpha is not None else self.scalings.get(part, Scaling())
                algorithm, weights = layer_weights(roles, partial(scaling, layer), self.tolerance)
                parts = split(layer, weights) if part == "transformer" else {layer: weights}
            except ValueError as error:
                raise ValueError(f"layer {f'{part}.{layer}'!r}: {error}") from None
            self.algorithms[algorithm] += 1
            self._add(part, parts)
        if not self.layers:
            raise ValueError("it holds no LoRA layers")

    def _grouped(self, tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
        """(part, layer) -> {role: tensor}."""
        grouped: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if why := alongside(name):
                self.left_out[name] = why
                continue
            key = understood(name)
            roles = grouped.setdefault((key.part, key.layer), {})
            if key.role in roles:
                raise ValueError(f"{name!r}: its layer has two {key.role} tensors under different keys")
            roles[key.role] = tensor
            self.forms[key.form] += 1
        if of_flux(grouped):  # T5 is Flux's second text encoder, whatever number or name a trainer gives it
            for part, layer in [pair for pair in grouped if pair[0] == "text_encoder_3"]:
                if ("text_encoder_2", layer) in grouped:
                    raise ValueError(f"layer {f'text_encoder_2.{layer}'!r} is there twice under different keys")
                grouped["text_encoder_2", layer] = grouped.pop((part, layer))
        return grouped

    def _finite(self, layer: str, roles: Mapping[str, torch.Tensor]) -> bool:
        bad = [role for role, t in roles.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
        why = f"its {bad[0]} holds NaN or infinite values" if bad else ""
        if bad and not self.drop_nonfinite:
            raise ValueError(f"layer {layer!r}: {why}")
        if bad:
            self.left_out[layer] = why
        return not bad

    def _add(self, part: str, parts: Mapping[str, LoraWeights]) -> None:
        known = self.layers.setdefault(part, {})
        if twice := sorted(set(parts) & set(known)):
            raise ValueError(f"layer {f'{part}.{twice[0]}'!r} is there twice under different keys")
        known.update(parts)
