"""Styles, which are words around a prompt, and presets, which are settings: both have names, and are files to share."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from pathlib import Path

from mole_app.studio.names import matching
from mole_app.studio.recipe import Recipe
from mole_app.studio.styles import SETTINGS, Style, preset, read_styles, save_styles
from mole_app.web.files import check_room, uploaded


class Presets:
    """The styles and presets that visitors keep in a folder: one file of all styles, as A1111 reads it, and recipes."""

    def __init__(self, folder: Path):
        self.folder, self.file, self._changing = folder, folder / "styles.csv", threading.Lock()

    @property
    def styles(self) -> dict[str, Style]:
        """The styles by name."""
        return read_styles(self.file) if self.file.exists() else {}

    @property
    def presets(self) -> dict[str, Path]:
        """Name -> recipe file."""
        return {path.stem: path for path in sorted(self.folder.glob("*.json"))}

    def add_styles(self, new: Iterable[Style]) -> list[str]:
        """Keep further styles. Returns their names. Raises ValueError if there is another one of a name."""
        with self._changing:
            known, new = self.styles, list(new)
            if taken := next((s.name for s in new if (is_known := matching(s.name, known)) and known[is_known] != s), None):
                raise ValueError(f"there is already another style {taken!r}: give it another name")
            self.folder.mkdir(parents=True, exist_ok=True)
            save_styles(self.file, (known | {style.name: style for style in new}).values())
        return [style.name for style in new]

    def add_preset(self, name: str, recipe: Recipe) -> str:
        """Keep the settings of a recipe. Returns its name. Raises ValueError if there is one of this name."""
        name = re.sub(r"[^\w .+-]", "_", name)[:60].strip(" .")
        with self._changing:
            if not name or matching(name, self.presets):
                raise ValueError(f"there is already a preset {name!r}: give another name" if name else "give it a name")
            self.folder.mkdir(parents=True, exist_ok=True)
            Recipe("", **{field: getattr(recipe, field) for field in SETTINGS}).save(self.folder / f"{name}.json")
        return name

    def add(self, path: Path) -> list[str]:
        """Keep what is in an uploaded file: styles, or the settings of a recipe or a picture. Returns their names."""
        with uploaded(path):
            check_room(self.folder.glob("*"), [path])
            if path.suffix.lower() == ".csv":
                return self.add_styles(read_styles(path).values())
            return [self.add_preset(path.stem, Recipe("", **preset(path)))]
