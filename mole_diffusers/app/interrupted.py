"""Jobs that ended with the app: each is a small file while it waits or runs, and what an earlier run of the app has left is
offered again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mole_diffusers.binding.config import mask_text
from mole_diffusers.lora.safe_files import read_json
from mole_diffusers.lora.whole_files import write_text
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import with_pictures


class Interrupted:
    """The files of a folder. Those that this app has written belong to its queue and are not offered."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._queued: set[Path] = set()

    def keep(self, owner: str, kind: str, recipe: Recipe, more: list[Any], over: Mapping[str, Image.Image]) -> Path:
        """Write down a job; its file, to be deleted once it is over.

        Args:
            more: plain data.
            over: the pictures that are drawn over, see `Actions.compose`; only the mask is kept.
        """
        path = self._of(owner) / f"{time.time_ns()}-{kind}.json"
        self._queued.add(path)
        mask = mask_text(over["mask"]) if "mask" in over else ""
        about = {"recipe": with_pictures(recipe, **over).to_dict(), "more": more, "mask": mask}
        write_text(path, json.dumps(about))
        return path

    def left(self, owner: str, kind: str) -> list[Path]:
        """The visitor's files of a kind that were left, the oldest first."""
        return [path for path in sorted(self._of(owner).glob(f"[!.]*-{kind}.json")) if path not in self._queued]

    def queued(self, path: Path) -> Path:
        """The file, which belongs to a job of this queue from now on. Raises ValueError if it does already."""
        if path in self._queued:
            raise ValueError("this was started again already")
        self._queued.add(path)
        return path

    def _of(self, owner: str) -> Path:
        return self.folder / hashlib.sha256(owner.encode()).hexdigest()[:32]  # what a browser says is no file name


def read(path: Path) -> tuple[Recipe, list[Any], str]:
    """The recipe, the plain data and the mask, as text, of a file. Raises ValueError where it cannot be used."""
    try:
        kept = read_json(path)
        return Recipe.from_dict(kept["recipe"]), [*kept["more"]], kept["mask"]
    except (FileNotFoundError, TypeError, KeyError, ValueError) as error:
        reason = str(error).replace(f"{path.parent}/", "") if isinstance(error, ValueError) else "it is of another release"
        raise ValueError(f"what was kept of this job cannot be used: {reason}") from error
