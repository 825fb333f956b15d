"""Tensors -> a file that is there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def save_whole(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write safetensors; a file that was at `path` stays until the new one is whole.

    Raises OSError where it cannot be written, the disk being full, say; safetensors' own error is not of that kind.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(dict(tensors), part, dict(metadata))
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
