"""Gates turn the state of a block, a layer or the prompt (or nothing) into one weight per expert."""

from mole_diffusers.gates.bank import GateBank, build_gate
from mole_diffusers.gates.config import FAMILIES, GateConfig
from mole_diffusers.gates.constant import ConstantGate, FactorGate, StaticGate
from mole_diffusers.gates.contract import Context, Gate, Layer
from mole_diffusers.gates.flow import FlowGate
from mole_diffusers.gates.mole import MoLEGate
from mole_diffusers.gates.prompt import LayerOfPromptGate, PromptGate
from mole_diffusers.gates.rank import RankGate
from mole_diffusers.gates.retrieval import RetrievalGate

__all__ = [
    "FAMILIES",
    "ConstantGate",
    "Context",
    "FactorGate",
    "FlowGate",
    "Gate",
    "GateBank",
    "GateConfig",
    "Layer",
    "LayerOfPromptGate",
    "MoLEGate",
    "PromptGate",
    "RankGate",
    "RetrievalGate",
    "StaticGate",
    "build_gate",
]
