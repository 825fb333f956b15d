"""Gates turn the state of a block, a layer or the prompt (or nothing) into one weight per expert."""

from mole_diffusers.gates.bank import GateBank
from mole_diffusers.gates.config import RECOMMENDED, GateConfig
from mole_diffusers.gates.contract import FAMILIES, Context, Family, Gate, GatePlace, Layer

__all__ = ["FAMILIES", "RECOMMENDED", "Context", "Family", "Gate", "GateBank", "GateConfig", "GatePlace", "Layer"]
