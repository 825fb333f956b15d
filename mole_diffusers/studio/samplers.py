"""Samplers by the names that people know, as schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import diffusers

from mole_diffusers.studio.names import matching

SDE, ODE = {"algorithm_type": "sde-dpmsolver++"}, {"algorithm_type": "dpmsolver++"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> scheduler class, and its options
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", ODE),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", SDE),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", ODE),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}
PLAIN = ("DDIM", "Euler a", "PLMS", "DDPM", "LCM")  # those without a schedule of Karras'
SAMPLERS = {
    f"{name} Karras" if karras else name: (kind, options if name in PLAIN else {"use_karras_sigmas": karras, **options})
    for name, (kind, options) in KINDS.items()
    for karras in ([False] if name in PLAIN else [False, True])
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
