"""What the gates did for one picture, as figures and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mole_app.studio.block_weights import block_names
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.studio.strength_schedule import StrengthSchedule
from mole_diffusers import Trace, denoiser
from mole_diffusers.inspection import Contributions, block_places, heat_map, places, shares

Shades = Mapping[str, str] | None  # LoRA -> its colour


@dataclass(frozen=True)
class GateReport:
    """What the gates did.

    Attributes:
        picture: the picture's file.
        experts: the LoRAs, in the same order as all weights.
        heat, shares, places: figures, see the functions of these names in `inspection`.
        labels: short name of a block (in a transformer, its module's name) -> gate location.
        weights: short name of a block -> mean weight of each expert, as applied.
        gates: the same before the tags' strengths, block weights and steps are applied. These values can be set by hand.
        notes: for the user, as for any picture.
    """

    picture: Path
    experts: list[str]
    heat: Image.Image
    shares: Image.Image
    places: dict[str, Image.Image]
    labels: dict[str, str]
    weights: dict[str, list[float]]
    gates: dict[str, list[float]]
    notes: list[str]

    def __str__(self) -> str:
        """Each LoRA's mean weight in words, for people who cannot see the figures."""
        rows = list(self.weights.values())
        means = [sum(row[n] for row in rows) / len(rows) for n in range(len(self.experts))]
        words = "mean weight: " + ", ".join(f"{name} {mean:.2f}" for name, mean in zip(self.experts, means, strict=True))
        return "; ".join([words, *self.notes])


def gate_report(
    studio: Studio, recipe: Recipe, picture: Path, notes: Sequence[str], trace: Trace, acted: Contributions, shades: Shades
) -> GateReport:
    """Report on a picture, from the trace and the contributions that were recorded while it was drawn.

    Raises ValueError if no LoRA acted on the picture.
    """
    with Image.open(picture) as image:
        by_place = places(image, acted, shades=shades)  # raises ValueError if no LoRA acted on the denoiser
    network: Any = denoiser(studio.base.pipe)
    labels = block_places(trace, block_names(network) if hasattr(network, "down_blocks") else None)
    table = trace.all_weights()
    schedule = StrengthSchedule(trace.experts, recipe.tags, unet=network, steps=recipe.steps)
    return GateReport(
        picture=picture,
        experts=list(trace.experts),
        heat=heat_map(trace, labels, locked=recipe.locks, shades=shades),
        shares=shares(trace, labels, shades=shades),
        places=by_place,
        labels={label: place for place, label in labels.items()},
        weights={label: table[place].mean(0).tolist() for place, label in labels.items()},
        gates={label: before_tags(table[place], schedule, place).tolist() for place, label in labels.items()},
        notes=list(notes),
    )


def before_tags(weights: torch.Tensor, schedule: StrengthSchedule, place: str) -> torch.Tensor:
    """Applied weights [steps, N] at a gate location -> [N] means of the gates themselves, over the steps whose tags are not
    0.

    An expert whose tag is 0 at every step gets 0.
    """
    block, factors = torch.tensor(schedule.block(place)), []
    for step in range(len(weights)):
        schedule.step = step
        factors.append(torch.tensor(schedule.part("unet")) * block)
    factor = torch.stack(factors)  # [steps, N]
    active = factor != 0
    gates = torch.where(active, weights / torch.where(active, factor, 1), 0)
    return gates.sum(0) / active.sum(0).clamp_min(1)
