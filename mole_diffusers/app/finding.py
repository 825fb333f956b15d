"""Which LoRAs of a catalog a prompt asks for, by the library's index of them."""

from __future__ import annotations

from mole_diffusers.retrieval.composing import retrieve_for
from mole_diffusers.retrieval.encoders import PipelineText
from mole_diffusers.retrieval.library import LoraLibrary, RetrievedLora
from mole_diffusers.studio.render import Studio


class Finder:
    """`finder(prompt)`: the LoRAs of a studio's catalog, by the studio's own text encoder.

    The index is made when it is asked for first, and again once the catalog has other files.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        self._library: LoraLibrary | None = None
        self._files: dict = {}

    def __call__(self, prompt: str) -> list[RetrievedLora]:
        files = dict(self.studio.catalog.loras)
        if not files:
            return []
        with self.studio.lock:
            if self._library is None or files != self._files:
                self._library, self._files = LoraLibrary.of(files, PipelineText(self.studio.pipe)), files
            return retrieve_for(self._library, self.studio.pipe, prompt)
