"""The LoRAs and gates of a recipe on a pipeline. They stay there, since the next picture often has the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mole_app.studio.catalog import UNTRAINED, Catalog, gates_hash
from mole_app.studio.recipe import Recipe
from mole_diffusers import Mixture, attach, attached, detach
from mole_diffusers.gates import UnfitGatesError
from mole_diffusers.merging import merge

MERGED = "merged"  # name of a merge on the pipeline


class Attachment:
    """What is attached to one pipeline, or to others over its models.

    Attributes:
        unfit: hashes of gates that were found not to fit the pipeline.
    """

    def __init__(self, catalog: Catalog):
        self.catalog, self.unfit = catalog, set[str]()
        self._key: tuple | None = None  # identifies what is attached; None if that is unknown

    def to(self, pipe: Any, recipe: Recipe) -> Mixture | None:
        """Attach the LoRAs and gates of a completed recipe, unless they already are. Returns None if it has no LoRA.

        Raises ValueError for gates that are others than those of the recipe or do not fit, and what `attach` raises.
        """
        kind, about = recipe.arm_and_name
        method = about if kind == "merge" else ""
        strengths = recipe.constant_strengths() if method else {}
        key = (id(pipe), list(recipe.experts.items()), recipe.gates, recipe.gates_sha256, method, list(strengths.items()))
        binding = recipe.tag_bindings() if recipe.binding != "none" and not method else None
        if key == self._key and (attached(pipe) is None) == (not recipe.experts):
            if (mixture := attached(pipe)) is not None:
                mixture.bind(None if binding is None else mixture.file_words | binding)
            return mixture
        self.forget()
        # Keep the order of the tags, which does not depend on file names: the order decides the last bits of a sum.
        experts = {name: self.catalog.expert(name) for name in recipe.experts}
        if not experts:
            detach(pipe)
        elif method:
            merged = merge({name: (expert, strengths[name]) for name, expert in experts.items()}, method)
            attach(pipe, {MERGED: merged}, "sum", binding=None)
        else:
            source = self.catalog.gates_source(recipe.gates)
            if recipe.gates not in UNTRAINED and gates_hash(Path(source)) != recipe.gates_sha256:
                raise ValueError(f"the gates {recipe.gates!r} have been replaced since this was asked for: start it again")
            try:
                attach(pipe, experts, source, binding=binding)
            except UnfitGatesError:  # anybody may have sent them
                self.unfit.add(recipe.gates_sha256)
                raise
        self._key = key
        return attached(pipe)

    def forget(self) -> None:
        """Call this after you attach something else to the pipeline. The next picture then attaches its own LoRAs again."""
        self._key = None
