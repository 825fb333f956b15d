"""From a config to a gate."""

from __future__ import annotations

from torch import nn

from mole_diffusers.gates.config import GateConfig
from mole_diffusers.gates.constant import ConstantGate, StaticGate
from mole_diffusers.gates.flow import FlowGate
from mole_diffusers.gates.mole import MoLEGate


def build_gate(config: GateConfig, experts: int, width: int) -> nn.Module:
    """One gate of the configured family; `width` is its feature size D."""
    if config.family in ("sum", "mean"):
        return ConstantGate("N" if config.family == "sum" else "1")
    if config.family == "static":
        return StaticGate(experts, config.total, config.bins)
    if config.family == "flow":
        return FlowGate(experts, width, config.start)
    return MoLEGate(experts, width, config.total, config.features)
