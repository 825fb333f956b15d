"""The gate families for tests to go through: a new one is among them."""

import torch
from tiers import thorough

from mole_diffusers.gates import GATE_TYPES, GatePlace
from mole_diffusers.lora import LoraWeights
from mole_diffusers.lora.stacking import Stack

C = 64
ROWS = tuple(LoraWeights(torch.full((r, C), 1 / (r * C)), torch.ones(8, r), scale) for r, scale in ((2, 1.0), (3, -1.0)))
PLACE = GatePlace(experts=2, width=C, tokens=0, is_network=False, layer_adapters=[(True, True)], stack=Stack(ROWS, (C,), 8))
GATES = {name: gate_type().gate(PLACE) for name, gate_type in GATE_TYPES.items()}  # one of each, with the default options

LEARNED = [name for name, gate_type in GATE_TYPES.items() if gate_type.learns]
INPUT_FREE = [name for name, gate in GATES.items() if gate.input_free]


def size(gate_type):
    """Of random parameters that matter and can be compared: scores or factors that are large only flip on rounding."""
    return 0.3 if gate_type == "retrieval" else 1.0


def gate_types(*fast, among=LEARNED):
    """Cases for `parametrize`: these families in the fast tier, the others in the thorough one."""
    return [*fast, *thorough(*(name for name in among if name not in fast))]
