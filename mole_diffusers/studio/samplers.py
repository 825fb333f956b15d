"""Samplers by the names that people know, as schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import diffusers

from mole_diffusers.studio.names import matching

KARRAS, PLAIN = {"use_karras_sigmas": True}, {"use_karras_sigmas": False}
SDE = {"algorithm_type": "sde-dpmsolver++"}
ODE = {"algorithm_type": "dpmsolver++"}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> scheduler class, and its options
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", PLAIN),
    "Euler Karras": ("EulerDiscreteScheduler", KARRAS),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", PLAIN),
    "Heun Karras": ("HeunDiscreteScheduler", KARRAS),
    "DPM2": ("KDPM2DiscreteScheduler", PLAIN),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", KARRAS),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", PLAIN),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", KARRAS),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", PLAIN | ODE),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", KARRAS | ODE),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", PLAIN | SDE),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", KARRAS | SDE),
    "DPM++ SDE": ("DPMSolverSDEScheduler", PLAIN),
    "DPM++ SDE Karras": ("DPMSolverSDEScheduler", KARRAS),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", PLAIN | ODE),
    "DPM++ 2S Karras": ("DPMSolverSinglestepScheduler", KARRAS | ODE),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "UniPC": ("UniPCMultistepScheduler", PLAIN),
    "UniPC Karras": ("UniPCMultistepScheduler", KARRAS),
    "DDPM": ("DDPMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}
NEEDED = {"DPMSolverSDEScheduler": "torchsde"}  # scheduler class -> package without which it does not draw
FLOW: dict[str, tuple[str, dict[str, Any]]] = {"Euler": ("FlowMatchEulerDiscreteScheduler", {})}  # of SD 3 and Flux


def samplers_of(scheduler: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """The samplers that can draw with the model of a scheduler: those of flows for a model that was trained as one, and
    those whose packages are installed."""
    return {name: made for name, made in _fitting(scheduler).items() if not _lacking(made[0])}


def _fitting(scheduler: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Those that fit the training of the model, installed or not."""
    return FLOW if "FlowMatch" in type(scheduler).__name__ else SAMPLERS


def _lacking(kind: str) -> str:
    """The package that a scheduler class needs and that is not installed; "" if it needs none."""
    package = NEEDED.get(kind, "")
    return package if package and find_spec(package) is None else ""


def sampler(name: str, scheduler: Any, seed: int | Sequence[int] = 0) -> Any:
    """A scheduler by its sampler's name in any case, for the model of `scheduler`; "" is that one itself.

    Args:
        seed: of the picture, or of each in a batch, for samplers that draw noise of their own, without the generator.

    Raises ValueError for a name that is unknown, that the model cannot be drawn with, or whose package is not installed.
    """
    if not name:
        return scheduler
    kind, options = _fitting(scheduler)[sampler_name(name, scheduler)]
    if kind in NEEDED:
        options = {**options, "noise_sampler_seed": seed}
    return getattr(diffusers, kind).from_config(scheduler.config, **options)


def sampler_name(name: str, scheduler: Any) -> str:
    """The name as it is written; raises as `sampler`."""
    fitting = _fitting(scheduler)
    if (found := matching(name, fitting)) is None:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(samplers_of(scheduler))}")
    if package := _lacking(fitting[found][0]):
        raise ValueError(f"the sampler {name!r} needs the package {package}: pip install 'mole-diffusers[samplers]'")
    return found
