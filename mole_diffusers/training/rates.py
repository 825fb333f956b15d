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
    a million. So what is multiplied with features gets 0.05 / sqrt(D), all else 0.05.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for bank in banks:
        for name, parameter in bank.named_parameters():
            wide = parameter.shape[-1] if name.endswith(("matrix", "pooler")) else 1
            groups.setdefault(REACH / wide**0.5 if lr is None else lr, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
