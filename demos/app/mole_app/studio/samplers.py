"""diffusers' schedulers by the sampler names that people know."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import diffusers

from mole_app.studio.names import matching

SDE, ODE = {"algorithm_type": "sde-dpmsolver++"}, {"algorithm_type": "dpmsolver++"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> scheduler class, and its options
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
CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # by default they clip predictions to -1..1, which fits pixels, not latents
PLAIN = ("DDIM", "Euler a", "PLMS", "DDPM", "LCM")  # those without a Karras schedule
SAMPLERS = {
    f"{name} Karras" if karras else name: (kind, options if name in PLAIN else {"use_karras_sigmas": karras, **options})
    for name, (kind, options) in SCHEDULERS.items()
    for karras in ([False] if name in PLAIN else [False, True])
}
NEEDED = {"DPMSolverSDEScheduler": "torchsde"}  # scheduler class -> package that it needs
FLOW: dict[str, tuple[str, dict[str, Any]]] = {"Euler": ("FlowMatchEulerDiscreteScheduler", {})}  # for SD 3 and Flux


def samplers_of(scheduler: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """The samplers that can draw with a scheduler's model and whose packages are installed. Models trained with flow
    matching have their own."""
    return {name: made for name, made in _fitting(scheduler).items() if not _lacking(made[0])}


def _fitting(scheduler: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """The samplers that fit how the model was trained, whether or not their packages are installed."""
    return FLOW if "FlowMatch" in type(scheduler).__name__ else SAMPLERS


def _lacking(kind: str) -> str:
    """The package that a scheduler class needs, if it is not installed; else ""."""
    package = NEEDED.get(kind, "")
    return package if package and find_spec(package) is None else ""


def sampler(name: str, scheduler: Any, seed: int | Sequence[int] = 0) -> Any:
    """The scheduler for a sampler's name, in any case, for the model of `scheduler`; "" returns `scheduler` itself.

    Args:
        seed: the seed of the picture, or of each in a batch. Some samplers draw their own noise, without the generator.

    Raises ValueError for an unknown name, a sampler that does not fit the model, or one whose package is not installed.
    """
    if not name:
        return scheduler
    kind, options = _fitting(scheduler)[sampler_name(name, scheduler)]
    if kind in CLIPPING:
        options = {**options, "clip_sample": scheduler.config.get("clip_sample", False)}
    if kind in NEEDED:
        options = {**options, "noise_sampler_seed": seed}
    return getattr(diffusers, kind).from_config(scheduler.config, **options)


def sampler_name(name: str, scheduler: Any) -> str:
    """The sampler's name with its usual upper and lower case. Raises what `sampler` raises."""
    fitting = _fitting(scheduler)
    if (found := matching(name, fitting)) is None:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(samplers_of(scheduler))}")
    if package := _lacking(fitting[found][0]):
        raise ValueError(f"the sampler {name!r} needs the package {package}: pip install 'mole-diffusers[samplers]'")
    return found
