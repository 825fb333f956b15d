"""The gallery: a folder of pictures and sheets.

Each is a PNG with its recipe inside, so the gallery needs no index, and it outlives the app.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from PIL import Image

from mole_app.studio import infotext
from mole_app.studio.infotext import FoundRecipe
from mole_app.studio.names import is_text
from mole_app.studio.prompt_syntax import Parsed, parse
from mole_app.studio.recipe import Recipe
from mole_app.web.sentences import way_in_words
from mole_diffusers.safe_files import RefusedFileError, read_json
from mole_diffusers.whole_files import write_text

FAVOURITES = "favourites.json"  # in the folder: a list of file names


@dataclass(frozen=True)
class Entry:
    """A picture of the gallery, and what its file contains."""

    path: Path
    contents: FoundRecipe
    favourite: bool

    @property
    def recipe(self) -> Recipe:
        return self.contents.recipe

    @property
    def parsed(self) -> Parsed:
        """The prompt's words and tags. A prompt that cannot be read has no tags: other programs have more kinds of them."""
        try:
            return parse(self.recipe.prompt, self.recipe.experts)
        except ValueError:
            return Parsed(self.recipe.prompt, ())

    @property
    def sheet(self) -> str:
        """What a sheet shows, such as "seed=1,2 by steps=4,8" or "base, sum, bound"; "" for a single picture."""
        return self._shows(str)

    @property
    def sheet_in_words(self) -> str:
        """The same as the page says it: "without LoRAs, all added up (sum), each in its place (bound)"."""
        return self._shows(lambda way: way_in_words(str(way)))

    def _shows(self, said: Callable[[Any], str]) -> str:
        shows = self.contents.sheet
        if isinstance(columns := shows.get("columns"), list):
            return ", ".join(map(said, columns))
        return " by ".join(str(shows[axis]) for axis in ("x", "y") if axis in shows)

    @property
    def label(self) -> str:
        """The text below the picture."""
        what = f"{self.sheet_in_words[:100]}: " if self.sheet else ""
        return f"{'★ ' if self.favourite else ''}{what}{self.parsed.text[:80]} · seed {self.recipe.seed}"


class Gallery:
    """The pictures of a folder. Threads may share it.

    The folder is created when it is first needed.

    Args:
        most: keep only this many pictures. Older ones are deleted, except favourites. None keeps all.
    """

    def __init__(self, folder: Path, *, most: int | None = None):
        self.folder, self.most = folder, most
        self._read: dict[tuple[str, int], FoundRecipe | None] = {}  # (file name, time it was written); None: no recipe
        self._lock = threading.Lock()

    def add(self, image: Image.Image, recipe: Recipe, sheet: Mapping[str, Any] | None = None) -> Path:
        """Write a picture and return its file, which is named after the time and the seed. It never overwrites a file.

        Args:
            sheet: for a sheet of pictures, what it shows, see `infotext.save`.
        """
        kind = "" if sheet is None else "-comparison" if "columns" in sheet else "-grid"
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".new-{token_hex(8)}.png"  # a name that no one else uses
        try:
            infotext.save(image, part, recipe, sheet)
            return _moved(part, self.folder, f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe.seed}{kind}")
        finally:
            part.unlink(missing_ok=True)
            self._delete_oldest()

    def entries(self, *, text: str = "", lora: str = "", favourites: bool = False) -> list[Entry]:
        """The pictures, newest first. Files other than PNGs with a recipe are left out.

        Args:
            text: words that must all be in the prompt, in the file name or in what a sheet shows, in any case.
            lora: part of the name of a LoRA that the picture was drawn with, in any case.
            favourites: whether to return only favourites.
        """
        wanted = text.lower().split()

        def fits(entry: Entry) -> bool:
            prompts = f"{entry.recipe.prompt} {entry.recipe.prompt_2}"
            said = f"{prompts} {entry.path.name} {entry.sheet} {entry.sheet_in_words}".lower()
            names = ["", *(tag.name.lower() for tag in entry.parsed.tags)]
            has_lora = any(lora.lower() in name for name in names)
            return entry.favourite >= favourites and has_lora and all(word in said for word in wanted)

        return [entry for entry in self._entries() if fits(entry)]

    def entry(self, name: str) -> Entry:
        """The picture with this file name. Raises ValueError if there is none."""
        if (found := next(self._entries(name), None)) is None:
            raise ValueError(f"there is no picture {name!r} in the gallery")
        return found

    def favour(self, name: str, on: bool) -> None:
        """Mark a picture as a favourite, or remove the mark."""
        self.entry(name)
        with self._lock:
            starred = self._favourites() - {name} | ({name} if on else set())
            write_text(self.folder / FAVOURITES, json.dumps(sorted(starred)) + "\n")

    # ---- the folder

    def _entries(self, name: str | None = None) -> Iterator[Entry]:
        """The pictures with a recipe, newest first; if `name` is given, only the one with this file name."""
        starred = self._favourites()
        for written, path in sorted(self._pictures(), reverse=True):
            if name in (None, path.name) and (inside := self._inside(path, written)) is not None:
                yield Entry(path, inside, path.name in starred)

    def _pictures(self) -> Iterator[tuple[int, Path]]:
        """Time in nanoseconds and path of every PNG whose name is UTF-8."""
        named = (path for path in self.folder.glob("[!.]*.png") if is_text(path.name))
        for path in named:
            with suppress(FileNotFoundError):  # another thread has just moved it
                yield path.stat().st_mtime_ns, path

    def _inside(self, path: Path, written: int) -> FoundRecipe | None:
        """What a file contains; None if it has no recipe. Each file is read only once."""
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
    """Move a PNG into a folder as "STEM.png", or "STEM-2.png" and so on if that is taken. Returns the new path."""
    for number in range(1, 10_000):
        new = folder / f"{stem}{'' if number == 1 else f'-{number}'}.png"
        try:
            new.open("xb").close()  # reserves the name, even if others write here, too
        except FileExistsError:
            continue
        return path.replace(new)
    raise ValueError(f"{folder.name} has too many pictures named {stem}")
