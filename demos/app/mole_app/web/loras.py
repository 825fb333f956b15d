"""The LoRAs of the app: what their files say, finding those that a prompt asks for, and adding more."""

from __future__ import annotations

import filecmp
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from mole_app.studio.catalog import preview
from mole_app.studio.names import matching
from mole_app.studio.prompt_syntax import PAINTED, parse
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import MAX_SIDE, Studio
from mole_app.web.files import check_room, uploaded
from mole_app.web.sentences import without_folders
from mole_diffusers import models_of
from mole_diffusers.binding import Role, mask_text
from mole_diffusers.lora import check_family, match, read_expert, with_host_names, words_of
from mole_diffusers.retrieval import LoraLibrary, PipelineText, RetrievedLora, retrieve_for, text_beside
from mole_diffusers.safe_files import read_picture

MAX_THUMBNAIL, THUMBNAIL = 4 << 20, 256  # bytes of a LoRA's picture that is read; pixels of the longer side of small copies


class Loras:
    """The LoRAs of a studio's catalog.

    Attributes:
        uploads: the folder of those that visitors have uploaded.

    Args:
        thumbnail: name of a LoRA -> a small picture, or None to take the one next to its file, see `catalog.preview`.
    """

    def __init__(self, studio: Studio, uploads: Path, thumbnail: Callable[[str], Image.Image | None] | None = None):
        self.studio, self.uploads, self._thumbnail = studio, uploads, thumbnail
        studio.catalog.find_loras([uploads])
        self._adding, self._finding = threading.Lock(), threading.Lock()
        self._reader = text_beside(studio.base.pipe)
        self._library: LoraLibrary | None = None
        self._library_of: Any = None  # base, reader and files; opening a base again makes a new reader

    def report(self, name: str, *, keep: bool = True) -> dict[str, Any]:
        """What a LoRA's file says about itself, how many of its layers this pipeline has, and what is wrong with it, or "".

        Args:
            keep: whether the LoRA stays in memory, ready to be drawn with.
        """
        catalog = self.studio.catalog
        facts: dict[str, Any] = {"name": name, "base": "", "format": "", "sha256": "", "ranks": "", "triggers": []}
        facts |= {"layers": 0, "matched": 0, "problem": ""}
        try:
            expert = catalog.expert(name, keep=keep)
            low, high = expert.ranks
            total = sum(len(layers) for layers in expert.layers.values())
            facts |= {"base": expert.base, "format": expert.format, "sha256": expert.sha256}
            facts |= {"ranks": f"{low}" if low == high else f"{low}..{high}", "triggers": list(words_of(expert).words)}
            facts["layers"] = total
            pipe, models = self.studio.base.pipe, models_of(self.studio.base.pipe)
            return facts | {"matched": total - len(match(with_host_names(expert, pipe, models), models).unmatched)}
        except (ValueError, OSError) as error:
            return facts | {"problem": without_folders(str(error))}

    def choices(self) -> list[tuple[str, str]]:
        """(label in a list, name) of every LoRA. Those that cannot be read, and those made for another model, are marked."""
        return [(f"{name}{self._mark(name)}", name) for name in self.studio.catalog.loras]

    def _mark(self, name: str) -> str:
        try:
            self.studio.catalog.family(name)
        except (ValueError, OSError):
            return " (cannot be read)"
        return " (for another model)" if self.studio.misfit(name) else ""

    def roles(self, recipe: Recipe) -> dict[str, Role]:
        """What each LoRA of a recipe's tags would do in the picture, as the prompt is read. Nothing is drawn or attached.
        What is to be painted may be missing."""
        tags = parse(recipe.prompt, self.studio.catalog.loras).tags
        painted = {tag.name: mask_text(Image.new("L", (1, 1), 255)) for tag in tags if tag.region == PAINTED}
        whole = replace(recipe, masks=painted | dict(recipe.masks))
        return dict(self.studio.explain(self.studio.complete(whole)).experts)

    def find(self, prompt: str) -> list[RetrievedLora]:
        """The LoRAs of the catalog that a prompt asks for, not counting its tags. It contains their name or a trigger, or
        resembles their samples.

        The library is indexed on first use, with the pipeline's own text encoder, and again when the catalog has changed.
        The search does not wait for a picture that is being drawn, unless the model is offloaded.
        """
        if not (loras := self.studio.catalog.loras):
            return []
        with self._finding, ExitStack() as stack:
            if (reader := self._reader) is None:
                stack.enter_context(self.studio.base.lock)
            self.studio.base.check_open()
            wanted = (self.studio.base.name, reader, loras)
            if self._library is None or self._library_of != wanted:
                self._library = LoraLibrary.of(loras, reader or PipelineText(self.studio.base.pipe))
                self._library_of = wanted
            return retrieve_for(self._library, self.studio.base.pipe, parse(prompt, loras).text)

    @contextmanager
    def let_go(self) -> Iterator[None]:
        """Hold no weights of the base model in the `with` block, and then read with those of the one that is open."""
        with self._finding:
            self._reader = self._library = self._library_of = None
        try:
            yield
        finally:
            self._reader = text_beside(self.studio.base.pipe)

    def add(self, path: Path) -> str:
        """Copy an uploaded LoRA into `uploads`, add it to the catalog under its file name, and return that name.

        If the same file is already here, it is not copied, and its name here is returned. Raises ValueError for anything but
        a good LoRA file for the open base model, for a name that another file has, and if there is no room. Nothing is left
        behind then.
        """
        self.uploads.mkdir(parents=True, exist_ok=True)
        with self._adding, uploaded(path):  # two of the same name may come at once
            loras, size = self.studio.catalog.loras, path.stat().st_size
            for known, file in list(loras.items()):
                if file.is_file() and file.stat().st_size == size and filecmp.cmp(file, path, shallow=False):
                    return known
            name = re.sub(r"[^\w .+-]", "_", path.name.removesuffix(".safetensors"))[:80].strip(" .") or "lora"
            copy = self.uploads / f"{name}.safetensors"
            if matching(name, loras) is not None or copy.exists():
                raise ValueError(f"there is already another LoRA {name!r}; rename the file")
            check_room(self.uploads.iterdir(), [path])
            try:
                check_family((expert := read_expert(path, name)).base, models_of(self.studio.base.pipe))
            except ValueError as error:
                said = without_folders(str(error))
                raise ValueError(said if path.name in said else f"{path.name}: {said}") from error
            part = copy.with_suffix(".part")
            shutil.copyfile(path, part)
            self.studio.catalog.add_lora(name, part.rename(copy), expert)
            return name

    def look_for_new(self) -> list[str]:
        """Add LoRA files that are new in the folders of the known ones, and return their names."""
        catalog = self.studio.catalog
        with self._adding:
            return catalog.find_loras(file.parent for file in catalog.loras.values())

    def thumbnail(self, name: str) -> Image.Image | None:
        """A small picture of a LoRA; None if there is none or it cannot be read."""
        if self._thumbnail and (small := self._thumbnail(name)):
            return small
        catalog = self.studio.catalog
        path = preview(catalog.loras[catalog.name(name)])
        if path is None or path.stat().st_size > MAX_THUMBNAIL:
            return None
        try:
            small = read_picture(path, path.name, most=MAX_SIDE**2).convert("RGB")
        except ValueError:  # another program wrote it, and we can do without
            return None
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        return small
