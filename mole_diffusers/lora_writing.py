"""LoraWeights -> a LoRA file that diffusers and kohya-format tools load as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mole_diffusers.lora_files import KOHYA_PREFIXES, ONETRAINER_PREFIX, LoraWeights
from mole_diffusers.whole_files import save_whole

Layers = Mapping[str, Mapping[str, LoraWeights]]  # part -> {module name of the host: weights}
FORMATS = ("diffusers", "kohya")


def write_lora(
    layers: Layers,
    path: str | Path,
    *,
    format: str = "diffusers",
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one ordinary LoRA. Every scale is folded into the up matrix: alpha equals the rank, the readers' default, so
    that no reader can take one layer's alpha for another's.

    Args:
        format: "diffusers" keys, or "kohya" keys.
        dtype: of the tensors in the file.
        metadata: strings for the file's header.

    Raises:
        ValueError: an unknown format, no layers, or a number that `dtype` cannot hold.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown LoRA format {format!r}; known: {list(FORMATS)}")
    name, (down, up) = (_kohya, ("lora_down", "lora_up")) if format == "kohya" else (_diffusers, ("lora_A", "lora_B"))
    tensors = {}
    for part, modules in layers.items():
        for module, weights in modules.items():
            stem = name(part, module)
            for half, matrix in ((down, weights.down.float()), (up, weights.up.float() * weights.scale)):
                if matrix.abs().max() > torch.finfo(dtype).max:
                    raise ValueError(f"the layer {part}.{module} holds numbers that {dtype} cannot; write a wider one")
                tensors[f"{stem}.{half}.weight"] = matrix.to(dtype).contiguous()
    if not tensors:
        raise ValueError(f"there is no layer to write to {path}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_whole(tensors, path, {"format": "pt", **(metadata or {})})


def _diffusers(part: str, module: str) -> str:
    return f"{part}.{_full(module)}"


def _kohya(part: str, module: str) -> str:
    # kohya has no name for a transformer's layers as diffusers has them; OneTrainer's is what other tools know.
    prefixes = {known: prefix for prefix, known in reversed(KOHYA_PREFIXES.items())} | {"transformer": ONETRAINER_PREFIX}
    return prefixes[part] + _full(module).replace(".", "_")


def _full(module: str) -> str:
    # CLIPTextModel lost its `text_model` level in transformers 5.6; readers of every age know the name with it.
    return f"text_model.{module}" if module.startswith("encoder.layers.") else module
