"""The base model that is open: it is kept from picture to picture, and can be replaced by another."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from threading import RLock
from typing import Any

from mole_app.studio import picture_passes
from mole_app.studio.attachment import Attachment
from mole_app.studio.base_models import Base
from mole_app.studio.catalog import Catalog
from mole_app.studio.controlnets import open_controlnet
from mole_app.studio.memory import clear_frames, release
from mole_app.studio.names import shared_name
from mole_app.studio.recipe import Recipe
from mole_app.studio.samplers import samplers_of
from mole_diffusers import detach

CHANGING = "the base model is being changed: wait a little"
NONE_OPEN = "no base model is open, since the last change failed: choose one"


class CurrentBase:
    """The base model that a studio draws with.

    Attributes:
        lock: held while a picture is drawn. Hold it to do anything else with the pipeline.
        name: "" while the base is changed, and if that failed and the one before could not be opened again.
        pipe: its pipeline.
        scheduler: that the pipeline came with.
        config: the config that it was opened with, see `open_base`.
        attachment: the LoRAs and gates on the pipeline.
        drawing_with: ControlNet, or None -> what draws with it, by what it draws over; each keeps what is attached to it.
    """

    def __init__(self, pipe: Any, catalog: Catalog, name: str, config: str | None = None):
        self.catalog, self.lock, self._why_none = catalog, RLock(), NONE_OPEN
        self._use(pipe, name, config)

    def _use(self, pipe: Any, name: str, config: str | None) -> None:
        self.pipe, self.scheduler, self.config = pipe, pipe.scheduler, config
        self.drawing_with = lru_cache(2)(self._all_drawing_with)
        self.attachment = Attachment(self.catalog)
        self.name = name  # last, since other threads see it as a sign that the rest is ready

    def _all_drawing_with(self, controlnet: Path | None) -> Callable[..., Any]:
        network = None if controlnet is None else open_controlnet(self.pipe, controlnet)
        return cache(partial(picture_passes.drawing_with, self.pipe, controlnet=network))

    def change(self, name: str, opening: Callable[[str], Base]) -> None:
        """Replace the base model. The old weights are freed first, so that two models are never in memory at once.

        Recipes that were completed before belong to the old base: complete them again.

        Args:
            opening: opens a base by name, for example `base_models.open_base`.

        Raises what `opening` raises, after opening the old base again. If that fails, too, it raises ValueError, and no base
        is open until you choose one.
        """
        with self.lock:
            before, self._why_none = self.name, CHANGING
            if (failed := self._put(name, opening)) is None:
                return
            again = self._put(before, opening) if before else None
            self._why_none = NONE_OPEN
            if again is not None:
                raise ValueError(f"{failed}; and {before} cannot be opened again: {again}") from failed
            raise failed

    def _put(self, name: str, opening: Callable[[str], Base]) -> Exception | None:
        """Open a base, in place of the open one if there is one. Returns the error if that fails."""
        try:
            if self.name:
                self.name = ""
                detach(self.pipe)
                self.drawing_with.cache_clear()
                release(self.pipe)
            found = opening(name)
        except Exception as error:
            clear_frames(error)
            return error
        self._use(found.pipe, found.name, found.config)
        return None

    def check_open(self) -> None:
        """Raises ValueError if no base model is open."""
        if not self.name:
            raise ValueError(self._why_none)

    def check_for(self, recipe: Recipe) -> None:
        """Raises ValueError if a recipe was completed for another base than the one that is open."""
        self.check_open()
        if shared_name(recipe.base) != shared_name(self.name):
            meant, here = (Path(base).name for base in (recipe.base, self.name))
            raise ValueError(f"this was meant for the base model {meant!r}, and now {here!r} is here: start it again")

    @property
    def samplers(self) -> list[str]:
        """The samplers that this base can be drawn with."""
        return list(samplers_of(self.scheduler))

    @property
    def takes_pictures(self) -> bool:
        """Whether ControlNets and IP-Adapters can be used with this base."""
        return any(kind.__name__ in picture_passes.CONTROLLED for kind in type(self.pipe).__mro__)
