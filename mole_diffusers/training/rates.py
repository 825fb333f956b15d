"""Learning rates that suit each gate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

REACH = 0.05  # how far one update may move a gate's logit


def rates(banks: Iterable[nn.Module], lr: float | None) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer; `lr` None lets one update move any gate's logits alike.

    Adam moves every entry by about the rate, so a logit over D features of length 1 moves by up to rate * sqrt(D):
    what is right for one number per expert is too much for a vector of 320, and far too much for a flattened state of
    a million. So a matrix over features gets 0.05 / sqrt(D). What reads raw states, whose D entries are of size 1 rather
    than the whole, gets 0.05 / D, and all else 0.05.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for bank in banks:
        for name, parameter in bank.named_parameters():
            reach = REACH / _length(name.rpartition(".")[2], parameter)
            groups.setdefault(reach if lr is None else lr, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _length(name: str, parameter: nn.Parameter) -> float:
    """How far a change of 1 in every entry moves what the parameter gives."""
    if name == "matrix":
        return parameter.shape[-1] ** 0.5
    if name == "up":  # a router's way out, [Cout, r]
        return parameter.shape[0]
    return parameter.shape[-1] if name in ("weight", "pooler", "down") else 1
