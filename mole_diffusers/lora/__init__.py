"""LoRA files -> Expert, whichever tool wrote them. Each layer keeps its own scale from the file."""

from mole_diffusers.lora.expert import COMPONENTS, Expert, LoraWeights
from mole_diffusers.lora.families import check_family, family_of, stated_base
from mole_diffusers.lora.keys import layer_key
from mole_diffusers.lora.metadata import summarize
from mole_diffusers.lora.reading import read_expert

__all__ = [
    "COMPONENTS",
    "Expert",
    "LoraWeights",
    "check_family",
    "family_of",
    "layer_key",
    "read_expert",
    "stated_base",
    "summarize",
]
