"""LoRA files -> Expert: whatever tool wrote them, every layer with its own scale, from the raw file."""

from mole_diffusers.lora.expert import PARTS, Expert, LoraWeights
from mole_diffusers.lora.families import check_family, family_of
from mole_diffusers.lora.keys import KOHYA_PREFIXES, ONETRAINER_PREFIX, layer_key
from mole_diffusers.lora.metadata import PEFT_METADATA, described, stated_base
from mole_diffusers.lora.reading import read_expert

__all__ = [
    "KOHYA_PREFIXES",
    "ONETRAINER_PREFIX",
    "PARTS",
    "PEFT_METADATA",
    "Expert",
    "LoraWeights",
    "check_family",
    "described",
    "family_of",
    "layer_key",
    "read_expert",
    "stated_base",
]
