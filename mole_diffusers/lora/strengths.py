"""LoRAs with their strengths, as `attach` and `merge` take them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from mole_diffusers.lora.expert import Expert
from mole_diffusers.lora.reading import read_expert

Source = str | Path | Expert
MAX_STRENGTH = 1e6  # far more than any picture survives; in fp32, products stay finite (fp16 ends at 65504)


def files_of(folder: str | os.PathLike) -> dict[str, Path]:
    """The LoRA files of a folder by their names. Raises FileNotFoundError if there are none."""
    found = {path.stem: path for path in sorted(Path(folder).glob("*.safetensors"))}
    if not found:
        raise FileNotFoundError(f"{folder} is no folder with LoRA files (*.safetensors)")
    return found


def read_weighed(experts: Mapping[str, Source | tuple[Source, float]]) -> dict[str, tuple[Expert, float]]:
    """The experts that `attach` and `merge` take, name -> (expert, strength). Raises TypeError or ValueError for others."""
    if not isinstance(experts, Mapping):
        raise TypeError(f"experts are names with files, as {{'fox': 'fox.safetensors'}}, got {experts!r}")
    read = {}
    for name, given in experts.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of an expert is text, as 'fox', got {name!r}")
        source, strength = given if isinstance(given, tuple) and len(given) == 2 else (given, 1.0)
        if not isinstance(source, str | os.PathLike | Expert):
            raise TypeError(f"expert {name!r} is a file or (file, strength), got {given!r}")
        read[name] = source if isinstance(source, Expert) else read_expert(source, name), finite(name, strength)
    return read


def finite(name: str, value: float) -> float:
    """The strength of an expert. Raises TypeError if it is no number, and ValueError if it is out of range."""
    try:
        if abs(value) <= MAX_STRENGTH:
            return float(value)
    except TypeError:
        raise TypeError(f"the strength of {name!r} must be a number, got {value!r}") from None
    wanted = f"in -{MAX_STRENGTH:g}..{MAX_STRENGTH:g}" if math.isfinite(value) else "a finite number"
    raise ValueError(f"the strength of {name!r} must be {wanted}, got {value}")
