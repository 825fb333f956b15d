"""The gates of one model, built from a config and looked up by place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mole_diffusers.gates.config import GateConfig
from mole_diffusers.gates.constant import ConstantGate, FactorGate, StaticGate
from mole_diffusers.gates.flow import FlowGate
from mole_diffusers.gates.mole import MoLEGate
from mole_diffusers.gates.rank import RankGate
from mole_diffusers.gates.retrieval import RetrievalGate
from mole_diffusers.lora.stacking import Stack


class GateBank(nn.Module):
    """The gates of one model by place. They stay fp32 whatever the model is cast to.

    A place is a module name of the model. Parameter names may not contain dots, so "/" replaces them there. The place of
    the network itself has no name, and is called "network" there.
    """

    def __init__(self, gates: dict[str, nn.Module]):
        super().__init__()
        self.gates = nn.ModuleDict({_key(place): gate for place, gate in gates.items()})

    def __getitem__(self, place: str) -> Any:
        return self.gates[_key(place)]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GateBank:
        # Take only the device from `fn`: a cast to half and back would round the trained weights.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def _key(place: str) -> str:
    return place.replace(".", "/") or "network"


def build_gate(config: GateConfig, experts: int, width: int, *, stack: Stack | None = None) -> nn.Module:
    """Build one gate of the configured family, except "prompt", whose gates weigh several layers.

    Args:
        width: D, the gate's feature size.
        stack: the experts of the gate's layer, if the gate sits at one layer.
    """
    return BUILDERS[config.family](config, experts, width, stack)


BUILDERS: dict[str, Callable[[GateConfig, int, int, Any], nn.Module]] = {
    "sum": lambda config, experts, width, stack: ConstantGate("N"),
    "mean": lambda config, experts, width, stack: ConstantGate("1"),
    "static": lambda config, experts, width, stack: StaticGate(experts, config.total, config.bins),
    "mole": lambda config, experts, width, stack: MoLEGate(experts, width, config.total, config.features, bias=config.bias),
    "flow": lambda config, experts, width, stack: FlowGate(experts, width, config.start),
    "retrieval": lambda config, experts, width, stack: RetrievalGate(
        width, stack.out, rank=config.rank, total=config.total, scores=config.scores
    ),
    "rank": lambda config, experts, width, stack: RankGate(
        width, stack.ranks, top=config.top, partition=config.partition, rate=config.rate
    ),
    "factors": lambda config, experts, width, stack: FactorGate(stack.ranks),
}
