"""The gates of one model, looked up by gate location."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mole_diffusers.gates.contract import Gate


class GateBank(nn.Module):
    """The gates of one model by gate location. They stay fp32 whatever the model is cast to.

    A gate location has the name of a module. Parameter names may not contain dots, so "/" replaces them there. The gate
    location of the network itself has no name, and is called "network" there.
    """

    def __init__(self, gates: Mapping[str, Gate]):
        super().__init__()
        self.gates = nn.ModuleDict({_key(location): gate for location, gate in gates.items()})

    def __getitem__(self, location: str) -> Any:
        return self.gates[_key(location)]

    def __iter__(self) -> Iterator[Gate]:
        return iter(self.gates.values())  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GateBank:
        # Take only the device from `fn`: a cast to half and back would round the trained weights.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def _key(location: str) -> str:
    return location.replace(".", "/") or "network"
