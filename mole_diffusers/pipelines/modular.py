"""SDXL blocks for modular diffusers that compose the LoRAs a call names."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import StableDiffusionXLAutoBlocks

from mole_diffusers.mixture import attach, attached, detach
from mole_diffusers.patching.install.installation import lock_of_pipeline


class MoLEStableDiffusionXLBlocks(StableDiffusionXLAutoBlocks):
    """`StableDiffusionXLAutoBlocks` with the inputs of `attach`. A call without `experts` keeps what is attached.

    `MoLEStableDiffusionXLBlocks().init_pipeline(...)` is a modular pipeline. `attach` itself takes any modular pipeline,
    too.
    """

    @property
    def inputs(self) -> list[Any]:
        """Diffusers' own inputs, and those of `attach`."""
        return [
            *super().inputs,
            InputParam("experts", type_hint=dict, description="name -> LoRA file, or (file, strength); {} takes all off"),
            InputParam("gates", type_hint=str, default="sum", description="a family, or a folder of trained gates"),
            InputParam("binding", default="auto", description="which words and which place are whose; None binds nothing"),
        ]

    def __call__(self, pipeline: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Attach the LoRAs that the call names, and run diffusers' blocks with them."""
        experts, gates, binding = (state.get(name) for name in ("experts", "gates", "binding"))
        with lock_of_pipeline(pipeline).held():
            if experts:
                attach(pipeline, experts, gates, binding=binding)
            elif experts is not None:
                detach(pipeline)
            mixture = attached(pipeline)
            with nullcontext() if mixture is None else mixture.drawing():
                return super().__call__(pipeline, state)
