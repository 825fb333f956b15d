"""Compose several concept LoRAs in one image: learned gates over experts, as a plugin for diffusers."""

from mole_diffusers.emoji.world import EmojiWorld, emoji_world
from mole_diffusers.gates import GateConfig
from mole_diffusers.gates.transforms import Strongest
from mole_diffusers.lora import Expert, read_expert
from mole_diffusers.lora.safe_files import RefusedFileError
from mole_diffusers.lora.writing import save_expert
from mole_diffusers.merging.activations import Activations
from mole_diffusers.merging.merge import merge
from mole_diffusers.mixture import Mixture, attach, attached, detach
from mole_diffusers.patching.processor import MoLEAttnProcessor
from mole_diffusers.patching.trace import Trace
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
