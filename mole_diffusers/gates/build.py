"""From a config to a gate."""

from __future__ import annotations

from torch import nn

from mole_diffusers.gates.config import GateConfig
from mole_diffusers.gates.constant import ConstantGate, StaticGate
from mole_diffusers.gates.flow import FlowGate
from mole_diffusers.gates.mole import MoLEGate
from mole_diffusers.gates.rank import RankGate
from mole_diffusers.gates.retrieval import RetrievalGate
from mole_diffusers.lora.stacking import Stack


def build_gate(config: GateConfig, experts: int, width: int, *, stack: Stack | None = None) -> nn.Module:
    """One gate of the configured family; `width` is its feature size D, `stack` the experts of its one layer."""
    if config.family in ("sum", "mean"):
        return ConstantGate("N" if config.family == "sum" else "1")
    if config.family == "static":
        return StaticGate(experts, config.total, config.bins)
    if config.family == "flow":
        return FlowGate(experts, width, config.start)
    if config.family == "retrieval" and stack is not None:
        return RetrievalGate(width, stack.out, rank=config.rank, total=config.total, scores=config.scores)
    if config.family == "rank" and stack is not None:
        return RankGate(width, stack.ranks, top=config.top, partition=config.partition, rate=config.rate)
    return MoLEGate(experts, width, config.total, config.features, bias=config.bias)
