"""Controls for trained gates: they keep the totals but remove what the gate learned. Pure tensor functions.

Each control is `control(location, gates, mask) -> gates` for `mixture.adjusted(control)`. gates [..., N] (or [..., R] if
they are per rank) are those of the trained gate; mask [N] or [B, N] bool says which may have weight. A control keeps the
sum of the gates (`Strongest` that of their sizes), so that only their division among the experts differs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from mole_diffusers import functional

Control = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def uniform(location: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Equal weights for all experts: the gate decides only the total."""
    share = mask / mask.sum(-1, keepdim=True).clamp_min(1)
    return gates.sum(-1, keepdim=True) * functional.over_tokens(share, gates)


def hardened(location: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The largest gate takes everything (argmax): the gate as a switch."""
    mask = functional.over_tokens(mask, gates)
    best = gates.masked_fill(~mask, -torch.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(gates).scatter(-1, best, gates.sum(-1, keepdim=True)) * mask


class Strongest:
    """Keep the `count` weights of each row (or token) that are largest in size. The others become 0.

    Those that stay are scaled, so that their sizes sum to what the sizes of all did.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"1 or more experts must weigh something, got {count}")
        self.count = count

    def __call__(self, location: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = gates * functional.among_largest(gates.abs(), self.count)
        return kept * gates.abs().sum(-1, keepdim=True) / kept.abs().sum(-1, keepdim=True).clamp_min(1e-12)


def frozen_random(seed: int) -> Control:
    """Weights drawn once per gate location, softmax of standard normal logits: a gate that varies by gate location but
    learned nothing.
    """

    def control(location: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {location}".encode()))
        logits = torch.randn(mask.shape[-1], generator=generator).to(gates.device)
        share = functional.gate_weights(logits.expand(mask.shape), mask, "1")  # shaped like mask
        return gates.sum(-1, keepdim=True) * functional.over_tokens(share, gates)

    return control
