"""The drop-in of each diffusers pipeline, and `MoLEPipeline`, which picks one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)

from mole_diffusers.pipelines.drop_in import DropIn
from mole_diffusers.pipelines.sources import HUB, saved_pipeline
from mole_diffusers.safe_files import pipeline_class


class MoLEStableDiffusionPipeline(DropIn, diffusers.StableDiffusionPipeline): ...


class MoLEStableDiffusionImg2ImgPipeline(DropIn, diffusers.StableDiffusionImg2ImgPipeline): ...


class MoLEStableDiffusionInpaintPipeline(DropIn, diffusers.StableDiffusionInpaintPipeline): ...


class MoLEStableDiffusionControlNetPipeline(DropIn, diffusers.StableDiffusionControlNetPipeline): ...


class MoLEStableDiffusionControlNetImg2ImgPipeline(DropIn, diffusers.StableDiffusionControlNetImg2ImgPipeline): ...


class MoLEStableDiffusionControlNetInpaintPipeline(DropIn, diffusers.StableDiffusionControlNetInpaintPipeline): ...


class MoLEStableDiffusionXLPipeline(DropIn, diffusers.StableDiffusionXLPipeline): ...


class MoLEStableDiffusionXLImg2ImgPipeline(DropIn, diffusers.StableDiffusionXLImg2ImgPipeline): ...


class MoLEStableDiffusionXLInpaintPipeline(DropIn, diffusers.StableDiffusionXLInpaintPipeline): ...


class MoLEStableDiffusionXLControlNetPipeline(DropIn, diffusers.StableDiffusionXLControlNetPipeline): ...


class MoLEStableDiffusionXLControlNetImg2ImgPipeline(DropIn, diffusers.StableDiffusionXLControlNetImg2ImgPipeline): ...


class MoLEStableDiffusionXLControlNetInpaintPipeline(DropIn, diffusers.StableDiffusionXLControlNetInpaintPipeline): ...


class MoLEStableDiffusion3Pipeline(DropIn, diffusers.StableDiffusion3Pipeline): ...


class MoLEFluxPipeline(DropIn, diffusers.FluxPipeline): ...


class MoLEFluxControlPipeline(DropIn, diffusers.FluxControlPipeline): ...


class MoLEQwenImagePipeline(DropIn, diffusers.QwenImagePipeline): ...


class MoLEZImagePipeline(DropIn, diffusers.ZImagePipeline): ...


class MoLEChromaPipeline(DropIn, diffusers.ChromaPipeline): ...


class MoLEFlux2Pipeline(DropIn, diffusers.Flux2Pipeline): ...


class MoLEFlux2KleinPipeline(DropIn, diffusers.Flux2KleinPipeline): ...


class MoLEKrea2Pipeline(DropIn, diffusers.Krea2Pipeline): ...


class MoLELumina2Pipeline(DropIn, diffusers.Lumina2Pipeline): ...


class MoLEHiDreamImagePipeline(DropIn, diffusers.HiDreamImagePipeline): ...


class MoLEWanPipeline(DropIn, diffusers.WanPipeline): ...


class MoLELTXPipeline(DropIn, diffusers.LTXPipeline): ...


DROP_INS = {kind.__bases__[1].__name__: kind for kind in DropIn.__subclasses__()}
for name, kind in DROP_INS.items():
    kind.__doc__ = f"`{name}` that composes what it loads."
# `AutoPipelineForText2Image.from_pipe` and similar classes look up a pipeline's class by name in these tables. A form
# without a drop-in is diffusers' own.
TABLES = (AUTO_TEXT2IMAGE_PIPELINES_MAPPING, AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING)
_named = [name for table in TABLES for name, kind in table.items() if kind.__name__ in DROP_INS]
for table in TABLES:
    table.update({f"mole-{name}": DROP_INS.get(table[name].__name__, table[name]) for name in _named if name in table})


class MoLEPipeline:
    """Picks the drop-in pipeline class for a given pipeline."""

    @staticmethod
    def from_pipe(pipe: Any, **kwargs: Any) -> Any:
        """The drop-in pipeline for `pipe`'s class, over the same models; `kwargs` as in diffusers.

        Raises ValueError if that class has no drop-in; `attach` may take its pipelines nevertheless.
        """
        return _drop_in([cls.__name__ for cls in type(pipe).__mro__]).from_pipe(pipe, **kwargs)

    @staticmethod
    def from_pretrained(source: str | Path, **kwargs: Any) -> Any:
        """The drop-in pipeline for what a folder or hub repository holds; `kwargs` as in diffusers."""
        source = saved_pipeline(source)
        index = diffusers.DiffusionPipeline.load_config(source, **{k: v for k, v in kwargs.items() if k in HUB})
        return _drop_in([pipeline_class(index, source)]).from_pretrained(source, **kwargs)


def _drop_in(names: Sequence[str]) -> Any:
    """The drop-in for the first name that has one."""
    for name in names:
        if name in DROP_INS:
            return DROP_INS[name]
    raise ValueError(f"{names[0]} has no drop-in pipeline; those that have one: {list(DROP_INS)}")
