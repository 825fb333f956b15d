"""Diffusers' modular blocks that compose the LoRAs a call names."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import diffusers
from diffusers.modular_pipelines import InputParam, PipelineState

from mole_diffusers.mixture import attach, attached, detach
from mole_diffusers.patching.install.installation import lock_of_pipeline


class ComposingBlocks:
    """Mixin for all blocks of a modular pipeline, which adds the inputs of `attach`.

    A call without `experts` keeps what is attached. `MoLEFluxBlocks().init_pipeline(...)`, say, is a modular pipeline.
    `attach` itself takes any modular pipeline, too.
    """

    @property
    def inputs(self) -> list[Any]:
        """Diffusers' own inputs, and those of `attach`."""
        return [
            *super().inputs,  # type: ignore[misc]
            InputParam("experts", type_hint=dict, description="name -> LoRA file, or (file, strength); {} takes all off"),
            InputParam("gates", type_hint=str, default="sum", description="a gate type, or a folder of trained gates"),
            InputParam("binding", default="auto", description="which words and which place are whose; None binds nothing"),
        ]

    def __call__(self, pipeline: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Attach the LoRAs that the call names, and run diffusers' blocks with them."""
        experts, gates, binding = (state.get(name) for name in ("experts", "gates", "binding"))
        with lock_of_pipeline(pipeline):
            if experts:
                attach(pipeline, experts, gates, binding=binding)
            elif experts is not None:
                detach(pipeline)
            mixture = attached(pipeline)
            with nullcontext() if mixture is None else mixture.drawing():
                return super().__call__(pipeline, state)  # type: ignore[misc]


class MoLEStableDiffusionXLBlocks(ComposingBlocks, diffusers.StableDiffusionXLAutoBlocks):
    """`StableDiffusionXLAutoBlocks` with the inputs of `attach`."""


class MoLEStableDiffusion3Blocks(ComposingBlocks, diffusers.StableDiffusion3AutoBlocks):
    """`StableDiffusion3AutoBlocks` with the inputs of `attach`."""


class MoLEFluxBlocks(ComposingBlocks, diffusers.FluxAutoBlocks):
    """`FluxAutoBlocks` with the inputs of `attach`."""


class MoLEFlux2KleinBlocks(ComposingBlocks, diffusers.Flux2KleinAutoBlocks):
    """`Flux2KleinAutoBlocks` with the inputs of `attach`."""


class MoLEQwenImageBlocks(ComposingBlocks, diffusers.QwenImageAutoBlocks):
    """`QwenImageAutoBlocks` with the inputs of `attach`."""


class MoLEZImageBlocks(ComposingBlocks, diffusers.ZImageAutoBlocks):
    """`ZImageAutoBlocks` with the inputs of `attach`."""


class MoLEKrea2Blocks(ComposingBlocks, diffusers.Krea2AutoBlocks):
    """`Krea2AutoBlocks` with the inputs of `attach`."""


class MoLEAnimaBlocks(ComposingBlocks, diffusers.AnimaAutoBlocks):
    """`AnimaAutoBlocks` with the inputs of `attach`."""


class MoLEWanBlocks(ComposingBlocks, diffusers.WanBlocks):
    """`WanBlocks` with the inputs of `attach`."""


class MoLELTXBlocks(ComposingBlocks, diffusers.LTXAutoBlocks):
    """`LTXAutoBlocks` with the inputs of `attach`."""
