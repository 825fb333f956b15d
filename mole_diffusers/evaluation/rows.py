"""Rows of an evaluation: one JSON line per picture, appended as they are made, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEY = ("case", "kind", "arm", "prompt", "seed", "settings")
PLACE = ("case", "prompt", "seed")


def key(row: Mapping[str, Any]) -> str:
    """What makes a row unique: everything that was asked for."""
    return json.dumps([row[name] for name in KEY], sort_keys=True)


def place(row: Mapping[str, Any]) -> tuple:
    """What the rows of several arms that are compared have in common: one prompt and one noise."""
    return tuple(row[name] for name in PLACE)


class Rows:
    """The rows in a folder: read those of every process, append to the file of this one.

    Processes never share a file, so that they may run on several machines with one folder between them.
    """

    def __init__(self, folder: Path, process: int = 0):
        self.folder, self.process = folder, process
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[Row]:
        """All rows, the first of each key; a last line that a killed run cut short is left out."""
        found: dict[str, Row] = {}
        for path in sorted(self.folder.glob("rows-*.jsonl")):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    row = json.loads(line)
                    found.setdefault(key(row), row)
        return list(found.values())

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows in one write; the rest of a line that a killed run left is cut off first."""
        path = self.folder / f"rows-{self.process}.jsonl"
        kept = path.read_bytes() if path.exists() else b""
        if kept and not kept.endswith(b"\n"):
            path.write_bytes(kept[: kept.rfind(b"\n") + 1])
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
