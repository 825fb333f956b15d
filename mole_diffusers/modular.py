"""The blocks of SDXL for modular diffusers, which compose the LoRAs that a call names."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import StableDiffusionXLAutoBlocks

from mole_diffusers.mixture import Mixture, attach, attached, detach

OWN = ("experts", "gates", "binding")  # inputs that are not diffusers'


class MoLEStableDiffusionXLBlocks(StableDiffusionXLAutoBlocks):
    """`StableDiffusionXLAutoBlocks` with the inputs of `attach`; a call without `experts` keeps what is attached.

    `MoLEStableDiffusionXLBlocks().init_pipeline(...)` is a modular pipeline. `attach` itself takes any modular pipeline too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._given: tuple[Any, ...] = ()
        self._mixture: Mixture | None = None  # what was attached for it

    @property
    def inputs(self) -> list[Any]:
        """Diffusers' own, and those of `attach`."""
        return [
            *super().inputs,
            InputParam("experts", type_hint=dict, description="name -> LoRA file, or (file, strength); {} takes all off"),
            InputParam("gates", type_hint=str, default="sum", description="a family, or a folder of trained gates"),
            InputParam("binding", default="auto", description="which words and which place are whose; None binds nothing"),
        ]

    def __call__(self, pipeline: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Attach what the call names, and run diffusers' blocks with it."""
        experts, *rest = (state.get(name) for name in OWN)
        if experts is not None and ((experts, *rest) != self._given or attached(pipeline) is not self._mixture):
            if experts:
                attach(pipeline, experts, rest[0], binding=rest[1])
            else:
                detach(pipeline)
            self._given, self._mixture = (dict(experts), *rest), attached(pipeline)
        mixture = attached(pipeline)
        with nullcontext() if mixture is None else mixture.drawing():
            return super().__call__(pipeline, state)
