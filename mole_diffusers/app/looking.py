"""What the gates did for one picture, in pictures and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mole_diffusers.inspection import gate_figures
from mole_diffusers.inspection.contributions import Contributions
from mole_diffusers.patching.trace import Trace
from mole_diffusers.studio.block_weights import StrengthSchedule, block_names
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import Studio


@dataclass(frozen=True)
class Made:
    """A picture in a file, and what made it."""

    label: str
    path: Path
    recipe: Recipe


@dataclass(frozen=True)
class Look:
    """What the gates did.

    Attributes:
        heat, shares, places: see `gate_figures`.
        labels: block's short name -> place.
        weights: block's short name -> mean weight of each expert, as it was applied.
        gates: the same before strengths, block weights and steps of the tags, which is what can be set by hand.
        doubt: see `Studio.doubt`.
    """

    made: Made
    experts: list[str]
    heat: Image.Image
    shares: Image.Image
    places: dict[str, Image.Image]
    labels: dict[str, str]
    weights: dict[str, list[float]]
    gates: dict[str, list[float]]
    doubt: str


def looked(
    studio: Studio,
    made: Made,
    shades: Mapping[str, str] | None,
    *,
    trace: Trace,
    found: Contributions,
    image: Image.Image,
) -> Look:
    """A trace, contributions and the picture that they are of, as one Look in the colours of `shades`."""
    recipe, unet = made.recipe, studio.pipe.unet
    labels = gate_figures.block_places(trace, block_names(unet))
    plan = StrengthSchedule(trace.experts, recipe.tags, unet=unet, steps=recipe.steps)
    return Look(
        made=made,
        experts=list(trace.experts),
        heat=gate_figures.heat_map(trace, labels, locked=recipe.locks, shades=shades),
        shares=gate_figures.shares(trace, labels, shades=shades),
        places=gate_figures.places(image, found, shades=shades),
        labels={label: place for place, label in labels.items()},
        weights={label: trace.weights(place).mean(0).tolist() for place, label in labels.items()},
        gates={label: before_tags(trace.weights(place), plan, place).tolist() for place, label in labels.items()},
        doubt=studio.doubt(recipe),
    )


def before_tags(weights: torch.Tensor, plan: StrengthSchedule, place: str) -> torch.Tensor:
    """Applied weights [steps, N] at a place -> [N], the gates' means over the steps in which the tags let them speak.

    An expert that they never let speak has 0.
    """
    block, factors = torch.tensor(plan.block(place)), []
    for step in range(len(weights)):
        plan.step = step
        factors.append(torch.tensor(plan.part("unet")) * block)
    factor = torch.stack(factors)  # [steps, N]
    spoke = factor != 0
    gates = torch.where(spoke, weights / torch.where(spoke, factor, 1), 0)
    return gates.sum(0) / spoke.sum(0).clamp_min(1)
