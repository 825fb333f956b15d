"""The tensors of one layer -> LoraWeights, by the algorithm that their names imply: LoRA, LoCon, LoHa or LoKr.

Shapes are checked before anything is multiplied, so that a small file cannot demand a large matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mole_diffusers.lora.expert import LoraWeights
from mole_diffusers.lora.factors import FactorPair, cut, hadamard, kronecker
from mole_diffusers.safe_files import check_memory

Tensors = Mapping[str, torch.Tensor]  # role -> tensor
Scale = Callable[[int | None], float]  # rank of the file's own factors, None if there are none -> alpha / r

MAX_RANK = 4096
MAX_SIDE = 1 << 17  # of a weight matrix; the largest layers of today's models have two fifths of it
MAX_WEIGHT = 1 << 29  # numbers in a layer's change of weight; Flux.2 dev has layers of 55296 x 6144
MAX_MADE = 1 << 29  # numbers in the factors that LoHa and LoKr layers of one file become, 2 GiB
MAX_OPERATIONS = 1e13  # of their decompositions, about a minute
MAX_LOHA_RANK = 1024  # of the product of its halves, 32 x 32; the cost of cutting it grows with the cube
MAX_NUMBER = 1e12  # in a change of weight; squares of larger ones, which decompositions take, would be infinite


class Budget:
    """Limits for all layers of one file together, so that a small file cannot ask for all memory, or for an hour."""

    def __init__(self) -> None:
        self.made, self.operations = 0, 0.0

    def spend(self, rank: int, rows: int, columns: int, *, operations: float) -> None:
        """Count factors [rows, rank] and [rank, columns] of one layer. Raises ValueError if the file takes too much, or the
        layer more than the free memory.
        """
        self.made += rank * (rows + columns)
        self.operations += operations
        if self.made > MAX_MADE or self.operations > MAX_OPERATIONS:
            raise ValueError(
                f"with the file's other LoHa and LoKr layers it becomes {self.made} numbers in {self.operations:.1g} "
                f"operations; at most {MAX_MADE} and {MAX_OPERATIONS:g} are accepted"
            )
        check_memory(12 * rank * (rows + columns), "its factors take")


def layer_weights(tensors: Tensors, scale: Scale, tolerance: float, budget: Budget) -> tuple[str, LoraWeights]:
    """(algorithm, weights) of one layer; `tolerance` is the relative error allowed for cutting LoHa and LoKr.

    Raises ValueError saying what is missing, does not fit, or is too large.
    """
    for role, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{role} is stored as {str(tensor.dtype).removeprefix('torch.')}, not as floating point")
        if tensor.dim() not in (2, 4) or 0 in tensor.shape:
            raise ValueError(f"{role} has shape {list(tensor.shape)}, which is not the shape of a LoRA factor")
    if any(role.startswith("hada") for role in tensors):
        algorithm, weights = "LoHa", _loha({role: t.float() for role, t in tensors.items()}, scale, tolerance, budget)
    elif any(role.startswith("lokr") for role in tensors):
        algorithm, weights = "LoKr", _lokr({role: t.float() for role, t in tensors.items()}, scale, tolerance, budget)
    else:
        weights = _lora(tensors, scale)
        algorithm = "LoCon" if weights.down.dim() == 4 and weights.down.shape[2:] != (1, 1) else "LoRA"
    check_largest(weights)
    return algorithm, weights


def check_largest(weights: LoraWeights) -> None:
    """Raises ValueError if the numbers of a layer are too large, or not finite."""
    if not (largest := weights.largest()) <= MAX_NUMBER:
        raise ValueError(f"its numbers go up to {largest:.2g}, too large for a weight: at most {MAX_NUMBER:g} is accepted")


def alpha_value(tensor: torch.Tensor) -> float:
    """The number in an alpha tensor; ValueError if it is not one number."""
    if tensor.numel() != 1 or tensor.dtype == torch.bool:
        raise ValueError("alpha is not one number")
    return float(tensor)


def _required(tensors: Tensors, *roles: str, optional: tuple[str, ...] = ()) -> list[torch.Tensor]:
    """The tensors of these roles. ValueError if one is missing, or if there is a role that does not belong."""
    if missing := [role for role in roles if role not in tensors]:
        raise ValueError(f"it has no {missing[0]} matrix")
    if foreign := sorted(set(tensors) - set(roles) - set(optional)):
        raise ValueError(f"its {foreign[0]} does not go with the rest")
    return [tensors[role] for role in roles]


def _check_size(rank: int, rows: int, columns: int) -> None:
    if max(rows, columns) > MAX_SIDE or rows * columns > MAX_WEIGHT:
        raise ValueError(f"it changes a weight of {rows} x {columns}, larger than any layer has")
    if rank > MAX_RANK:
        raise ValueError(f"its rank {rank} is too large: at most {MAX_RANK} is accepted")


# ---- LoRA and LoCon


def _lora(tensors: Tensors, scale: Scale) -> LoraWeights:
    down, up = _required(tensors, "down", "up", optional=("mid",))
    if "mid" in tensors:
        down = _tucker(tensors["mid"], down)
    if up.dim() != down.dim() or up.shape[1] != down.shape[0]:
        raise ValueError(f"down {list(down.shape)} and up {list(up.shape)} are not a low-rank pair")
    if up.dim() == 4 and up.shape[2:] != (1, 1):
        raise ValueError(f"the up matrix {list(up.shape)} of a convolution must be 1 x 1")
    _check_size(len(down), len(up), down[0].numel())
    return LoraWeights(down, up, scale(len(down)))


def _tucker(core: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """core [r, s, k, k], down [s, Cin] or [s, Cin, 1, 1] -> [r, Cin, k, k]."""
    if core.dim() != 4 or core.shape[1] != down.shape[0] or down[0].numel() != down.shape[1]:
        raise ValueError(f"core {list(core.shape)} and down {list(down.shape)} are not a convolution in three factors")
    columns = core[0, 0].numel() * down.shape[1]
    _check_size(max(core.shape[:2]), 1, columns)
    check_memory(8 * len(core) * columns, "a convolution in three factors takes")
    return torch.einsum("rskl,si->rikl", core.float(), down.float().flatten(1))


# ---- LoHa and LoKr


def _loha(tensors: Tensors, scale: Scale, tolerance: float, budget: Budget) -> LoraWeights:
    names = [f"hada_w{i}_{half}" for i in (1, 2) for half in "ab"]
    if any(matrix.dim() != 2 for matrix in _required(tensors, *names, optional=("hada_t1", "hada_t2"))):
        raise ValueError(f"{', '.join(names)} are not all matrices")
    if ("hada_t1" in tensors) != ("hada_t2" in tensors):
        raise ValueError("it has one of hada_t1 and hada_t2 and not the other")
    first, second = (_low_rank(tensors, f"hada_w{i}", core=f"hada_t{i}") for i in (1, 2))
    rows, columns = len(first[0]), first[1][0].numel()
    if (len(second[0]), second[1].shape[1:]) != (rows, first[1].shape[1:]):
        raise ValueError(f"its halves change weights of {rows} x {columns} and {len(second[0])} x {second[1][0].numel()}")
    if (rank := len(first[1]) * len(second[1])) > MAX_LOHA_RANK:
        raise ValueError(f"the product of its ranks, {rank}, is too large: at most {MAX_LOHA_RANK} is accepted")
    budget.spend(rank, rows, columns, operations=4.0 * rank**2 * (rows + columns + rank))
    up, down = hadamard(*((u, d.flatten(1)) for u, d in (first, second)))
    (up, down), error = _finite(cut, up, down, tolerance)
    return _shaped(up, down, first[1].shape[1:], scale=scale(len(first[1])), error=error)


def _lokr(tensors: Tensors, scale: Scale, tolerance: float, budget: Budget) -> LoraWeights:
    known = tuple(f"lokr_w{i}{half}" for i in (1, 2) for half in ("", "_a", "_b"))
    _required(tensors, optional=(*known, "lokr_t2"))
    first, second = (_lokr_factor(tensors, i) for i in (1, 2))
    if first[1].dim() != 2:
        raise ValueError("lokr_w1 is not a matrix")
    rows, columns = (len(first[0]) * len(second[0]), first[1].shape[1] * second[1][0].numel())
    most = min(len(first[1]), len(first[0]), first[1].shape[1]) * min(len(second[1]), len(second[0]), second[1][0].numel())
    _check_size(most, rows, columns)
    halves = ((len(f[1]), len(f[0]) + f[1][0].numel()) for f in (first, second))
    budget.spend(most, rows, columns, operations=sum(4.0 * rank**2 * (sides + rank) for rank, sides in halves))
    (up, down), error = _finite(kronecker, first, (second[0], second[1].flatten(1)), tolerance)
    inner = (first[1].shape[1] * second[1].shape[1], *second[1].shape[2:])
    # alpha is divided by the rank of the second matrix, else of the first; two full ones tell none
    ranks = [len(down) for i, (_, down) in ((2, second), (1, first)) if f"lokr_w{i}" not in tensors]
    return _shaped(up, down, inner, scale=scale(ranks[0] if ranks else None), error=error)


def _lokr_factor(tensors: Tensors, i: int) -> FactorPair:
    """One of LoKr's two matrices as up [O, r], down [r, I] or [r, Cin, k, k]. If it is stored full, one is the identity."""
    full = tensors.get(f"lokr_w{i}")
    if full is None:
        return _low_rank(tensors, f"lokr_w{i}", core=f"lokr_t{i}")
    if f"lokr_w{i}_a" in tensors or f"lokr_w{i}_b" in tensors:
        raise ValueError(f"it has lokr_w{i} both whole and in factors")
    columns = full[0].numel()
    _check_size(min(len(full), columns), len(full), columns)
    # The identity of the shorter side is the other factor.
    if len(full) <= columns:
        return torch.eye(len(full)), full
    return full.flatten(1), torch.eye(columns).reshape(columns, *full.shape[1:])


def _low_rank(tensors: Tensors, name: str, *, core: str) -> FactorPair:
    """A matrix stored in factors: up [O, r], down [r, I], or [r, Cin, k, k] with a core."""
    halves = (f"{name}_a", f"{name}_b")
    up, down = _required({role: tensors[role] for role in halves if role in tensors}, *halves)
    if core in tensors:  # up is stored as [r, O] then
        up, down = up.T if up.dim() == 2 else up, _tucker(tensors[core], down)
    if up.dim() != 2 or up.shape[1] != len(down):
        raise ValueError(f"{name}_a {list(up.shape)} and {name}_b {list(down.shape)} are not a low-rank pair")
    _check_size(len(down), len(up), down[0].numel())
    return up, down


def _finite(decompose: Callable, *matrices: Any) -> tuple[FactorPair, float]:
    """The result of `decompose`; ValueError if its factors overflow."""
    try:
        made, error = decompose(*matrices)
    except torch.linalg.LinAlgError:
        error = math.nan
    if not math.isfinite(error):
        raise ValueError("the product of its factors is too large for a number")
    return made, error


def _shaped(up: torch.Tensor, down: torch.Tensor, inner: tuple[int, ...], *, scale: float, error: float) -> LoraWeights:
    """The pair in the shape of a linear layer's, or of a convolution's if the file tells its kernel."""
    down = down.reshape(len(down), *inner)
    return LoraWeights(down, up.reshape(*up.shape, *(1,) * (down.dim() - 2)), scale, error)
