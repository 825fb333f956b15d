"""A LoRA file -> Expert. Everything is checked here; the result can be attached without further checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from mole_diffusers.lora.algorithms import Budget, alpha_value, layer_weights
from mole_diffusers.lora.dora import SHAPES, with_magnitude
from mole_diffusers.lora.expert import Expert, FileNotes, LoraWeights
from mole_diffusers.lora.families import base_of
from mole_diffusers.lora.keys import EMBEDDED_IN, EMBEDDING, FLUX_BLOCKS, HAVE_ORIGINAL_NAMES, Key, parse_key, split_fused
from mole_diffusers.lora.metadata import Scaling, read_peft_config, scalings, stated_beside
from mole_diffusers.lora.own_words import stated_words
from mole_diffusers.safe_files import RefusedFileError, TensorFile, read_safetensors

TOLERANCE = 0.01


def read_expert(
    path: str | Path, name: str | None = None, *, tolerance: float = TOLERANCE, drop_nonfinite: bool = False
) -> Expert:
    """Read one LoRA file. Only safetensors are read; the content decides, not the suffix.

    Args:
        tolerance: the relative error allowed for cutting LoHa and LoKr layers to a lower rank; 0 keeps every rank. Each
            layer's own error is in its `error`.
        drop_nonfinite: leave out layers with NaN or infinite values instead of refusing the file; `left_out` names them.

    Raises:
        FileNotFoundError: no such file.
        RefusedFileError: everything that `safe_files` refuses; no LoRA keys, an unsupported algorithm, a missing or
            mismatched pair, an impossible shape, a value that is not finite or far too large, or a broken PEFT config
            (in the header or next to adapter_model.safetensors). The message names the file and the layer.
    """
    path = Path(path)
    if not path.is_file():
        inside = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:5]) if path.is_dir() else ""
        hint = f", a folder; give a file in it: {inside}" if inside else ""
        if not path.is_dir() and not path.suffix:  # "owner/name"
            hint = ": give a .safetensors file; one on the Hugging Face hub has to be downloaded first"
        raise FileNotFoundError(f"no LoRA file at {path}{hint}")
    contents = read_safetensors(path)
    try:
        return _expert(path, name or path.stem, contents, tolerance=tolerance, drop_nonfinite=drop_nonfinite)
    except ValueError as error:
        raise RefusedFileError(f"{path}: {error}") from None


def _expert(path: Path, name: str, contents: TensorFile, *, tolerance: float, drop_nonfinite: bool) -> Expert:
    stated, budget = scalings(contents.metadata, read_peft_config(path)), Budget()
    triggers = stated_words(stated_beside(path), contents.metadata)
    embeddings, left_out = _embeddings(contents.tensors, (triggers or (path.stem,))[0])
    keys = {key: parse_key(key) for key in contents.tensors if not EMBEDDING.fullmatch(key)}
    layers: dict[str, dict[str, LoraWeights]] = {}
    file_names: dict[str, str] = {}
    algorithms: Counter[str] = Counter()
    for (component, layer), (module, roles) in _grouped(keys, contents.tensors).items():
        where = f"{component}.{layer}"
        bad = [role for role, t in roles.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
        why = f"its {bad[0]} holds NaN or infinite values" if bad else ""
        if why and drop_nonfinite:
            left_out[where] = why
            continue
        try:
            if why:
                raise ValueError(why)
            alpha = roles.pop("alpha", None)
            magnitudes = {role: roles.pop(role) for role in SHAPES if role in roles}
            of_config = stated.get(component, Scaling())
            scaling = of_config if alpha is None else Scaling(alpha_value(alpha))
            algorithm, weights = layer_weights(roles, partial(scaling, module), tolerance, budget)
            for role, magnitude in magnitudes.items():
                algorithm, weights = "DoRA", with_magnitude(weights, role, magnitude)
            if of_config.dora and not magnitudes:
                raise ValueError("its PEFT config says DoRA, and it has no magnitudes")
        except ValueError as error:
            raise ValueError(f"layer {where!r}: {error}") from None
        algorithms[algorithm] += 1
        layers.setdefault(component, {})[layer] = weights
        file_names[where] = module
    if not layers:
        raise ValueError("it holds no LoRA layers")
    base = base_of(layers, contents.metadata)
    if base in (*HAVE_ORIGINAL_NAMES, "unknown") and "transformer" in layers:
        layers["transformer"] = _with_diffusers_names(layers["transformer"])
    return Expert(
        name=name,
        layers=layers,
        format=Counter(key.format for key in keys.values()).most_common(1)[0][0],
        base=base,
        triggers=triggers or tuple(embeddings),
        source=str(path),
        sha256=contents.sha256,
        metadata=contents.metadata,
        embeddings=embeddings,
        notes=FileNotes(dict(algorithms), left_out, file_names),
    )


def _with_diffusers_names(layers: Mapping[str, LoraWeights]) -> dict[str, LoraWeights]:
    named: dict[str, LoraWeights] = {}
    for layer, weights in layers.items():
        try:
            made = split_fused(layer, weights)
        except ValueError as error:
            raise ValueError(f"layer {f'transformer.{layer}'!r}: {error}") from None
        if twice := sorted(set(made) & set(named)):
            raise ValueError(f"layer {f'transformer.{twice[0]}'!r} is there twice under different keys")
        named |= made
    return named


def _embeddings(tensors: Mapping[str, torch.Tensor], word: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """The embeddings that were trained with a LoRA, as in `Expert.embeddings`; and key -> why it is left out.

    Args:
        word: of embeddings without one.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    left_out = {}
    for key, match in ((key, match) for key in tensors if (match := EMBEDDING.fullmatch(key))):
        vectors, part = tensors[key], EMBEDDED_IN.get(match["of"] or match["bare"])
        if part is None:
            left_out[key] = "an embedding for a text encoder that takes no new words"
        elif vectors.dim() not in (1, 2) or not vectors.is_floating_point() or not torch.isfinite(vectors.float()).all():
            left_out[key] = "an embedding that is no list of vectors of finite numbers"
        else:
            found.setdefault(match["word"] or word, {})[part] = vectors.reshape(-1, vectors.shape[-1])
    return found, left_out


def _grouped(
    keys: Mapping[str, Key], tensors: Mapping[str, torch.Tensor]
) -> dict[tuple[str, str], tuple[str, dict[str, torch.Tensor]]]:
    """(component, layer) -> its name in the file, and {role: tensor}."""
    is_flux = any(key.component == "transformer" and key.layer.startswith(FLUX_BLOCKS) for key in keys.values())
    grouped: dict[tuple[str, str], tuple[str, dict[str, torch.Tensor]]] = {}
    for name, key in keys.items():
        # T5 is Flux's second text encoder, whatever number or name a trainer gives it.
        component = "text_encoder_2" if is_flux and key.component == "text_encoder_3" else key.component
        _, roles = grouped.setdefault((component, key.layer), (key.module, {}))
        if key.role in roles:
            raise ValueError(f"{name!r}: its layer has two {key.role} tensors under different keys")
        roles[key.role] = tensors[name]
    return grouped
