"""LoRA files -> Expert: whatever tool wrote them, every layer with its own scale, from the raw file."""

from mole_diffusers.lora.expert import COMPONENTS, Expert, LoraWeights
from mole_diffusers.lora.families import check_family, family_of
from mole_diffusers.lora.keys import KOHYA_PREFIXES, ONETRAINER_PREFIX, layer_key
from mole_diffusers.lora.metadata import PEFT_METADATA, stated_base, summarize
from mole_diffusers.lora.reading import read_expert

__all__ = [
    "COMPONENTS",
    "KOHYA_PREFIXES",
    "ONETRAINER_PREFIX",
    "PEFT_METADATA",
    "Expert",
    "LoraWeights",
    "check_family",
    "family_of",
    "layer_key",
    "read_expert",
    "stated_base",
    "summarize",
]
