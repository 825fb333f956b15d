"""Compose several concept LoRAs in one image: learned gates over experts, as a plugin for diffusers."""

from mole_diffusers.gates import GateConfig
from mole_diffusers.lora_files import Expert, read_expert
from mole_diffusers.mixture import Mixture, attach, attached, detach
from mole_diffusers.pipelines import MoLEStableDiffusionPipeline
from mole_diffusers.processor import MoLEAttnProcessor
from mole_diffusers.trace import Trace
from mole_diffusers.world import EmojiWorld, emoji_world

__version__ = "0.1.0"
__all__ = [
    "EmojiWorld",
    "Expert",
    "GateConfig",
    "Mixture",
    "MoLEAttnProcessor",
    "MoLEStableDiffusionPipeline",
    "Trace",
    "attach",
    "attached",
    "detach",
    "emoji_world",
    "read_expert",
]
