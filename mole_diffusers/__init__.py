"""Compose several concept LoRAs in one image: learned gates over experts, as a plugin for diffusers."""

from mole_diffusers.attaching import attach, attached, detach
from mole_diffusers.gates import GateConfig
from mole_diffusers.gates.controls import Strongest
from mole_diffusers.lora_files import Expert, read_expert
from mole_diffusers.merging.activations import Activations
from mole_diffusers.merging.merge import merge
from mole_diffusers.mixture import Mixture
from mole_diffusers.pipelines import (
    MoLEPipeline,
    MoLEStableDiffusionControlNetImg2ImgPipeline,
    MoLEStableDiffusionControlNetInpaintPipeline,
    MoLEStableDiffusionControlNetPipeline,
    MoLEStableDiffusionImg2ImgPipeline,
    MoLEStableDiffusionInpaintPipeline,
    MoLEStableDiffusionPipeline,
    MoLEStableDiffusionXLControlNetImg2ImgPipeline,
    MoLEStableDiffusionXLControlNetInpaintPipeline,
    MoLEStableDiffusionXLControlNetPipeline,
    MoLEStableDiffusionXLImg2ImgPipeline,
    MoLEStableDiffusionXLInpaintPipeline,
    MoLEStableDiffusionXLPipeline,
)
from mole_diffusers.processor import MoLEAttnProcessor
from mole_diffusers.safe_files import RefusedFileError
from mole_diffusers.saving import save_expert
from mole_diffusers.trace import Trace
from mole_diffusers.world import EmojiWorld, emoji_world

__version__ = "0.1.0"
__all__ = [
    "Activations",
    "EmojiWorld",
    "Expert",
    "GateConfig",
    "Mixture",
    "MoLEAttnProcessor",
    "MoLEPipeline",
    "MoLEStableDiffusionControlNetImg2ImgPipeline",
    "MoLEStableDiffusionControlNetInpaintPipeline",
    "MoLEStableDiffusionControlNetPipeline",
    "MoLEStableDiffusionImg2ImgPipeline",
    "MoLEStableDiffusionInpaintPipeline",
    "MoLEStableDiffusionPipeline",
    "MoLEStableDiffusionXLControlNetImg2ImgPipeline",
    "MoLEStableDiffusionXLControlNetInpaintPipeline",
    "MoLEStableDiffusionXLControlNetPipeline",
    "MoLEStableDiffusionXLImg2ImgPipeline",
    "MoLEStableDiffusionXLInpaintPipeline",
    "MoLEStableDiffusionXLPipeline",
    "RefusedFileError",
    "Strongest",
    "Trace",
    "attach",
    "attached",
    "detach",
    "emoji_world",
    "merge",
    "read_expert",
    "save_expert",
]
