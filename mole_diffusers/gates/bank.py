"""The gates of one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class GateBank(nn.Module):
    """The gates of one model by place; stays fp32 whatever the host is cast to.

    A place is a module name of the host; its dots become "/" in parameter names, which may hold none. The network's
    own place has no name and is called "network" there.
    """

    def __init__(self, gates: dict[str, nn.Module]):
        super().__init__()
        self.gates = nn.ModuleDict({_key(place): gate for place, gate in gates.items()})

    def __getitem__(self, place: str) -> Any:
        return self.gates[_key(place)]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GateBank:
        # Only the device is taken from `fn`: a cast to half and back would round what was trained.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def _key(place: str) -> str:
    return place.replace(".", "/") or "network"
