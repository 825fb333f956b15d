"""What is known about a picture once it is drawn: where its LoRAs acted, and what binding warns of."""

from __future__ import annotations

from dataclasses import dataclass, field

from mole_app.studio.recipe import Recipe
from mole_diffusers import Mixture
from mole_diffusers.binding import INACTIVE, OWN_PLACE, OWN_TILE, Explanation, Layout, region_mask

WHERE = {OWN_PLACE: "in a place of its own", OWN_TILE: "in a tile of its own", INACTIVE: "nowhere"}  # as people read them


@dataclass
class PictureNotes:
    """What the mixture of a picture says once it is drawn.

    Attributes:
        layout: where its LoRAs acted, if they have places.
        warnings: those of binding.
        locations: of the gates.
    """

    layout: Layout | None = None
    warnings: list[str] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)

    def take(self, mixture: Mixture, recipe: Recipe) -> None:
        """Note what the mixture says right after the first pass."""
        self.locations, self.warnings = mixture.gate_names, mixture.binding_warnings
        bound = (mixture.binding or {}).items()
        side = recipe.height // 8, recipe.width // 8
        given = {name: region_mask(b.given, *side) for name, b in bound if b.given is not None}
        if found := mixture.layouts:
            self.layout = found[0]
        elif given:  # without words, only these regions
            self.layout = Layout(given, {})

    def of_loras(self, recipe: Recipe, explanation: Explanation) -> dict[str, str]:
        """What each LoRA of a completed recipe did, in a few words: its strength, where it acted, and why."""
        regions = {} if self.layout is None else self.layout.regions
        said = {}
        for tag in recipe.tags:
            role = explanation.experts[tag.name]
            strength = str(tag.unet) if tag.te == tag.unet else f"{tag.unet} (text encoder {tag.te})"
            where = WHERE.get(role.place, role.place)
            if tag.name in regions:
                where += f", {regions[tag.name].float().mean():.0%} of the picture"
            said[tag.name] = f"at {strength}, {where}: {role.why}"
        return said
