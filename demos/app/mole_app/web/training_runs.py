"""Folders of training runs. A run can be continued, started over, or begun with the gates of an earlier run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole_app.studio.catalog import Catalog
from mole_diffusers import Mixture
from mole_diffusers.gates import GATE_CONFIG, GATE_WEIGHTS, GateConfig, load_gates
from mole_diffusers.safe_files import RefusedFileError, read_json
from mole_diffusers.training import checkpoints
from mole_diffusers.whole_files import new_folder

AGAIN = ("continue", "overwrite")
RUNS, SETTINGS, GATE_FILES = ".runs", "run.json", (GATE_WEIGHTS, GATE_CONFIG)


class GatesExistError(ValueError):
    """There are already gates of this name with other settings. They can be continued or overwritten."""


@dataclass(frozen=True)
class TrainingRun:
    """The folders of a training: one with checkpoints, to continue from, and one with the gates when it is done.

    Attributes:
        settings: plain data. A run is continued if these are the same.
    """

    catalog: Catalog
    home: Path
    name: str
    gate_type: str
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self.home / RUNS / self.name

    @property
    def first_gates(self) -> Path | GateConfig:
        """The gates that the training begins with."""
        start = self.folder / "start"
        return start if start.is_dir() else GateConfig(self.gate_type)

    def check(self, again: str) -> None:
        """Raises GatesExistError if `again` must say what to do, and ValueError if that cannot be done."""
        if again not in ("", *AGAIN):
            raise ValueError(f"again is one of {', '.join(AGAIN)}, got {again!r}")
        saved = self._saved_settings()
        if saved == self.settings or not (saved or self.name in self.catalog.gates):
            return
        if not again:
            raise GatesExistError(f"there are gates {self.name!r} with other settings: continue from them, or overwrite?")
        if again == "continue" and (gate_type := load_gates(self._source()).config.gate_type) != self.gate_type:
            raise ValueError(f"the gates {self.name!r} are {gate_type} gates: continue with these, or overwrite them")

    def prepare(self, again: str) -> None:
        """Make the folder. It stays as it is if the settings are the same, else it is new, with any gates to continue."""
        if self._saved_settings() == self.settings:
            return
        with new_folder(self.folder) as new:
            if again == "continue":
                shutil.copytree(self._source(), new / "start", ignore=lambda folder, names: set(names) - set(GATE_FILES))
            (new / SETTINGS).write_text(json.dumps(self.settings, indent=1) + "\n")

    def publish(self, mixture: Mixture) -> None:
        """Save the trained gates, replacing any of this name, and add them to the catalog."""
        with new_folder(final := self.home / self.name) as new:
            mixture.save_pretrained(new)
        self.catalog.add_gates(self.name, final)

    def _saved_settings(self) -> Any:
        try:
            return read_json(self.folder / SETTINGS)
        except (FileNotFoundError, RefusedFileError):
            return None

    def _source(self) -> Path:
        """The gates to continue from: the finished ones, else those of the last checkpoint."""
        if self.name in self.catalog.gates:
            return self.catalog.gates[self.name]
        if not (found := checkpoints(self.folder)):
            raise ValueError(f"the run {self.name!r} has no checkpoint yet: overwrite it")
        return found[-1]
