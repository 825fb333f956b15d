"""DoRA (Liu et al., 2024) on the weights of a base as up @ down, exactly.

With m the magnitudes, the weight becomes c (W + s B A), where c = m / |W + s B A| for each row. So the change of weight is
the sum of (c - 1) W and c s B A.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mole_diffusers.lora.expert import LoraWeights
from mole_diffusers.safe_files import check_memory

# Role of the magnitudes in a file -> their shape, of a matrix and of a convolution. LyCORIS can also train one magnitude for
# each column, which it writes as PEFT writes those of rows.
SHAPES = {"dora_scale": ((-1, 1), (-1, 1, 1, 1)), "magnitude": ((-1,), (1, -1, 1, 1))}


def with_magnitude(weights: LoraWeights, role: str, magnitude: torch.Tensor) -> LoraWeights:
    """Weights with the magnitudes of a file. Raises ValueError if they are not one number for each row."""
    rows = len(weights.up)
    known = [tuple(rows if side == -1 else side for side in shape) for shape in SHAPES[role]]
    if not magnitude.is_floating_point() or tuple(magnitude.shape) not in known:
        raise ValueError(f"its magnitudes {list(magnitude.shape)} are not one number for each of its {rows} rows")
    return replace(weights, magnitude=magnitude.flatten())


def on_base(weights: LoraWeights, magnitude: torch.Tensor, base: torch.Tensor) -> LoraWeights:
    """The change of a base's weight [Cout, ...] by DoRA: of rank r and the shorter side of the base's weight.

    Raises ValueError if a row of the changed weight is 0, so that it has no direction, and RefusedFileError if free memory
    cannot hold the change.
    """
    inner, flat = base.shape[1:], base.detach().to(weights.down.device, torch.float32).flatten(1)  # [Cout, I]
    rank = weights.rank + min(flat.shape)
    check_memory(8 * rank * sum(flat.shape), "DoRA on the base's own weights takes")
    down, up = weights.down.float().flatten(1), weights.scale * weights.up.float().flatten(1)
    norms = torch.linalg.vector_norm(flat + up @ down, dim=1)  # [Cout]
    if not norms.all():
        raise ValueError("a row of the base's weight is 0 with DoRA's change, so it has no direction")
    factor = (magnitude.float() / norms)[:, None]
    if len(flat) <= flat.shape[1]:
        of_base = torch.diag(factor[:, 0] - 1), flat
    else:
        of_base = (factor - 1) * flat, torch.eye(flat.shape[1])
    up, down = torch.cat([factor * up, of_base[0]], 1), torch.cat([down, of_base[1]])
    return LoraWeights(down.reshape(rank, *inner), up.reshape(*up.shape, *(1,) * (len(inner) - 1)), 1.0, weights.error)
