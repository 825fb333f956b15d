"""Drop-in pipelines: code written for diffusers' LoRA calls works unchanged, and gates compose what it loads.

A drop-in saves its mixture with the pipeline: experts, gates and strengths in one folder, see `keep` and `attach_kept`.
"""

from mole_diffusers.pipelines.classes import (
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
from mole_diffusers.pipelines.drop_in import DropIn
from mole_diffusers.pipelines.kept import attach_kept, keep

__all__ = [
    "DropIn",
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
    "attach_kept",
    "keep",
]
