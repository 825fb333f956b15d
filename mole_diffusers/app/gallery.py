"""The gallery: pictures in a folder, and sheets of them, each a PNG with its recipe inside, so that it needs no index and
outlives the app."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from PIL import Image

from mole_diffusers.lora.safe_files import RefusedFileError, read_json
from mole_diffusers.lora.whole_files import write_text
from mole_diffusers.studio import infotext
from mole_diffusers.studio.infotext import Contents
from mole_diffusers.studio.recipe import Recipe

FAVOURITES, TRASH = "favourites.json", "trash"  # in the folder: a list of file names; a folder of what was deleted


@dataclass(frozen=True)
class Entry:
    """A picture of the gallery, and what is inside."""

    path: Path
    contents: Contents
    favourite: bool

    @property
    def recipe(self) -> Recipe:
        return self.contents.recipe

    @property
    def sheet(self) -> str:
        """What a sheet of pictures shows, in words: "seed=1,2 by steps=4,8", or "base, sum, bound"; "" for a single one."""
        shows = self.contents.sheet
        if isinstance(columns := shows.get("columns"), list):
            return ", ".join(map(str, columns))
        return " by ".join(str(shows[axis]) for axis in ("x", "y") if axis in shows)

    @property
    def label(self) -> str:
        """What stands below it."""
        what = f"{self.sheet[:80]}: " if self.sheet else ""
        return f"{'★ ' if self.favourite else ''}{what}{self.recipe.text[:80]} · seed {self.recipe.seed}"


class Gallery:
    """The pictures of a folder, which is made when it is first needed. Threads may share it.

    Args:
        most: the oldest pictures beyond so many are deleted, but for favourites; None keeps all.
    """

    def __init__(self, folder: Path, *, most: int | None = None):
        self.folder, self.most = folder, most
        self._read: dict[tuple[str, int], Contents | None] = {}  # (file name, time it was written); None without a recipe
        self._lock = threading.Lock()

    def add(self, image: Image.Image, recipe: Recipe, sheet: Mapping[str, Any] | None = None) -> Path:
        """Write a picture; its file, named after the time and the seed. No file is ever overwritten.

        Args:
            sheet: what a sheet of pictures shows, see `infotext.save`.
        """
        kind = "" if sheet is None else "-comparison" if "columns" in sheet else "-grid"
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".new-{token_hex(8)}.png"  # a name that nobody else has
        try:
            infotext.save(image, part, recipe, sheet)
            return _moved(part, self.folder, f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe.seed}{kind}")
        finally:
            part.unlink(missing_ok=True)
            self._delete_oldest()

    def entries(self, *, text: str = "", lora: str = "", favourites: bool = False) -> list[Entry]:
        """The pictures, newest first. Files that are no PNG with a recipe are left out.

        Args:
            text: words that the prompt, the file name or what a sheet shows has, each of them, in any case.
            lora: a LoRA that the picture was drawn with, in any case.
            favourites: only those.
        """
        wanted = text.lower().split()

        def fits(entry: Entry) -> bool:
            said = f"{entry.recipe.prompt} {entry.recipe.prompt_2} {entry.path.name} {entry.sheet}".lower()
            names = ["", *(tag.name.lower() for tag in entry.recipe.tags)]
            return entry.favourite >= favourites and lora.lower() in names and all(word in said for word in wanted)

        return [entry for entry in self._entries() if fits(entry)]

    def entry(self, name: str) -> Entry:
        """The picture of this file name. Raises ValueError for a name that is no picture's here."""
        if (found := next(self._entries(name), None)) is None:
            raise ValueError(f"there is no picture {name!r} in the gallery")
        return found

    def favour(self, name: str, on: bool) -> None:
        """Mark a picture as a favourite, or no longer."""
        self.entry(name)
        with self._lock:
            starred = self._favourites() - {name} | ({name} if on else set())
            write_text(self.folder / FAVOURITES, json.dumps(sorted(starred)) + "\n")

    def trash(self, name: str) -> Path:
        """Move a picture to the folder "trash" beside the others; where it is now. Nothing is deleted there."""
        path = self.entry(name).path
        (self.folder / TRASH).mkdir(exist_ok=True)
        return _moved(path, self.folder / TRASH, path.stem)

    # ---- the folder

    def _entries(self, name: str | None = None) -> Iterator[Entry]:
        """The pictures with a recipe, newest first; only that of a file name."""
        starred = self._favourites()
        for written, path in sorted(self._pictures(), reverse=True):
            if name in (None, path.name) and (inside := self._inside(path, written)) is not None:
                yield Entry(path, inside, path.name in starred)

    def _pictures(self) -> Iterator[tuple[int, Path]]:
        """Time in nanoseconds and path of every PNG."""
        for path in self.folder.glob("[!.]*.png"):
            with suppress(FileNotFoundError):  # another one has just moved it
                yield path.stat().st_mtime_ns, path

    def _inside(self, path: Path, written: int) -> Contents | None:
        """What is in a file; None without a recipe. Read once."""
        key = path.name, written
        if key not in self._read:
            try:
                self._read[key] = infotext.contents(path)
            except (ValueError, FileNotFoundError):
                self._read[key] = None
        return self._read[key]

    def _favourites(self) -> set[str]:
        try:
            names = read_json(self.folder / FAVOURITES)
        except (FileNotFoundError, RefusedFileError):
            return set()
        return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()

    def _delete_oldest(self) -> None:
        if self.most is not None:
            starred = self._favourites()
            for _, path in sorted(self._pictures())[: -self.most]:
                if path.name not in starred:
                    path.unlink(missing_ok=True)


def _moved(path: Path, folder: Path, stem: str) -> Path:
    """Move a PNG into a folder as "STEM.png", or "STEM-2.png" and so on where that is taken; its new path."""
    for number in range(1, 10_000):
        new = folder / f"{stem}{'' if number == 1 else f'-{number}'}.png"
        try:
            new.open("xb").close()  # the name is ours, whoever else writes here
        except FileExistsError:
            continue
        return path.replace(new)
    raise ValueError(f"{folder.name} has too many pictures named {stem}")
