"""Every term of gate training by name. Each is a function of what there is to study, and of its own options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mole_diffusers.training.collage import collage
from mole_diffusers.training.denoising import denoising_loss
from mole_diffusers.training.distill import base, composed, separate, single
from mole_diffusers.training.rewards import clip, rollout
from mole_diffusers.training.study import Study, Term, need


def denoise(study: Study, *, guidance: float = 1.0) -> Term:
    """The diffusion loss on pictures with captions; `guidance` other than 1 fits the guided prediction to them."""
    samples = need(study.lesson.samples, "denoise", "pictures")
    return lambda draw: denoising_loss(study.pipe, samples, draw, guidance=guidance)


OBJECTIVES: dict[str, Callable[..., Term]] = {
    "single": single,
    "composed": composed,
    "base": base,
    "separate": separate,
    "denoise": denoise,
    "clip": clip,
    "collage": collage,
    "rollout": rollout,
}
BALANCE = "balance"  # reads the gates while the other terms run


@dataclass(frozen=True)
class Weighted:
    """How one term takes part: its weight, its rows per update (None: the run's), and its own options."""

    weight: float
    batch: int | None
    options: dict[str, Any]


def parse(name: str, given: float | Mapping[str, Any]) -> Weighted:
    """A weight, or {"weight", "batch", option: value} -> Weighted; ValueError names what is known."""
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"weight": given}
    if name not in (*OBJECTIVES, BALANCE):
        raise ValueError(f"unknown term {name!r}; known: {[*OBJECTIVES, BALANCE]}")
    weight, batch = options.pop("weight", 1.0), options.pop("batch", None)
    known = [*inspect.signature(OBJECTIVES[name]).parameters][1:] if name in OBJECTIVES else []
    if unknown := set(options) - set(known):
        raise ValueError(f"unknown options {sorted(unknown)} of the {name} term; known: {['weight', 'batch', *known]}")
    if not isinstance(weight, int | float) or not weight >= 0:
        raise ValueError(f"the weight of the {name} term must be 0 or more, got {weight!r}")
    return Weighted(float(weight), batch, options)
