"""Drop-in pipelines: code written for diffusers' LoRA calls works as it is, and gates compose what it loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import (
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from mole_diffusers.dropin import HUB, DropIn


class MoLEStableDiffusionPipeline(DropIn, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that composes what it loads."""


class MoLEStableDiffusionImg2ImgPipeline(DropIn, StableDiffusionImg2ImgPipeline):
    """`StableDiffusionImg2ImgPipeline` that composes what it loads."""


class MoLEStableDiffusionInpaintPipeline(DropIn, StableDiffusionInpaintPipeline):
    """`StableDiffusionInpaintPipeline` that composes what it loads."""


class MoLEStableDiffusionControlNetPipeline(DropIn, StableDiffusionControlNetPipeline):
    """`StableDiffusionControlNetPipeline` that composes what it loads."""


class MoLEStableDiffusionControlNetImg2ImgPipeline(DropIn, StableDiffusionControlNetImg2ImgPipeline):
    """`StableDiffusionControlNetImg2ImgPipeline` that composes what it loads."""


class MoLEStableDiffusionControlNetInpaintPipeline(DropIn, StableDiffusionControlNetInpaintPipeline):
    """`StableDiffusionControlNetInpaintPipeline` that composes what it loads."""


class MoLEStableDiffusionXLPipeline(DropIn, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that composes what it loads."""


class MoLEStableDiffusionXLImg2ImgPipeline(DropIn, StableDiffusionXLImg2ImgPipeline):
    """`StableDiffusionXLImg2ImgPipeline` that composes what it loads."""


class MoLEStableDiffusionXLInpaintPipeline(DropIn, StableDiffusionXLInpaintPipeline):
    """`StableDiffusionXLInpaintPipeline` that composes what it loads."""


class MoLEStableDiffusionXLControlNetPipeline(DropIn, StableDiffusionXLControlNetPipeline):
    """`StableDiffusionXLControlNetPipeline` that composes what it loads."""


class MoLEStableDiffusionXLControlNetImg2ImgPipeline(DropIn, StableDiffusionXLControlNetImg2ImgPipeline):
    """`StableDiffusionXLControlNetImg2ImgPipeline` that composes what it loads."""


class MoLEStableDiffusionXLControlNetInpaintPipeline(DropIn, StableDiffusionXLControlNetInpaintPipeline):
    """`StableDiffusionXLControlNetInpaintPipeline` that composes what it loads."""


KINDS = {
    kind.__bases__[1].__name__: kind
    for kind in (
        MoLEStableDiffusionPipeline,
        MoLEStableDiffusionImg2ImgPipeline,
        MoLEStableDiffusionInpaintPipeline,
        MoLEStableDiffusionControlNetPipeline,
        MoLEStableDiffusionControlNetImg2ImgPipeline,
        MoLEStableDiffusionControlNetInpaintPipeline,
        MoLEStableDiffusionXLPipeline,
        MoLEStableDiffusionXLImg2ImgPipeline,
        MoLEStableDiffusionXLInpaintPipeline,
        MoLEStableDiffusionXLControlNetPipeline,
        MoLEStableDiffusionXLControlNetImg2ImgPipeline,
        MoLEStableDiffusionXLControlNetInpaintPipeline,
    )
}


class MoLEPipeline:
    """Chooses the drop-in pipeline of the right kind."""

    @staticmethod
    def from_pipe(pipe: Any, **kwargs: Any) -> Any:
        """The drop-in pipeline of `pipe`'s kind over the same models; `kwargs` as in diffusers.

        Raises ValueError for a kind that has none; `attach` takes any.
        """
        return _kind(cls.__name__ for cls in type(pipe).__mro__).from_pipe(pipe, **kwargs)

    @staticmethod
    def from_pretrained(source: str | Path, **kwargs: Any) -> Any:
        """The drop-in pipeline of the kind that lies in a folder or hub repository; `kwargs` as in diffusers."""
        config = DiffusionPipeline.load_config(source, **{k: v for k, v in kwargs.items() if k in HUB})
        return _kind([config["_class_name"]]).from_pretrained(source, **kwargs)


def _kind(names: Iterable[str]) -> Any:
    """The drop-in for the first name that has one."""
    names = list(names)
    for name in names:
        if name in KINDS:
            return KINDS[name]
    raise ValueError(f"{names[0]} has no drop-in pipeline; those that have one: {list(KINDS)}")
