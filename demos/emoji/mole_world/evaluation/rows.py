"""Rows of an evaluation: one JSON line per picture, appended as pictures are drawn, so that a killed run can continue.

A row has everything that its picture depends on, with short digests for files and prompts. Pictures are next to the rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]
KEY = ("case", "kind", "method", "prompt", "seed", "settings")  # the fields that make a row unique: the whole request
SAME_NOISE = ("case", "prompt", "seed")  # the fields that rows share when methods are compared on one prompt and one noise
DIGITS = 12


def digest(parts: Iterable[bytes]) -> str:
    """The first twelve digits of SHA-256 over `parts`, each with its length, so that parts cannot run into each other."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:DIGITS]


def digest_files(*paths: Path) -> str:
    """Digest of the contents of files, in the order given."""
    return digest(path.read_bytes() for path in paths)


def digest_texts(*texts: str) -> str:
    """Digest of texts, in the order given."""
    return digest(text.encode() for text in texts)


def key(row: Mapping[str, Any], fields: Sequence[str] = KEY) -> str:
    """What makes a row unique, as text."""
    return json.dumps([row[name] for name in fields], sort_keys=True)


class Rows:
    """The rows in a folder: reads those of all processes, and appends to the file of this one.

    Processes never share a file, so they may run on several machines with a common folder.

    Args:
        name: the files are NAME-0.jsonl, NAME-1.jsonl, ...
        fields: what makes a row unique.
    """

    def __init__(self, folder: Path, process: int = 0, *, name: str = "rows", fields: Sequence[str] = KEY):
        self.folder, self.process, self.name, self.fields = folder, process, name, fields
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[Row]:
        """All rows, the first of each key. A last line that was cut short by a killed run is left out.

        Raises ValueError naming a line that is not a row.
        """
        found: dict[str, Row] = {}
        for path in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
                try:
                    row = json.loads(line)
                    found.setdefault(key(row, self.fields), row)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: not a row with {', '.join(self.fields)}: {error}") from error
        return list(found.values())

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows in one write, after removing an unfinished line that a killed run may have left."""
        path = self.folder / f"{self.name}-{self.process}.jsonl"
        kept = path.read_bytes() if path.exists() else b""
        if kept and not kept.endswith(b"\n"):
            path.write_bytes(kept[: kept.rfind(b"\n") + 1])
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def picture_path(folder: Path, row: Row) -> Path:
    """The path of a row's picture: pictures/METHOD/CASE/SEED-DIGEST.png, with characters that paths cannot contain replaced.

    The digest is that of `key`, so other settings or prompts have other files.
    """
    method, case = (re.sub(r"[^\w+@.-]+", "_", row[name]) for name in ("method", "case"))
    return folder / "pictures" / method / case / f"{row['seed']}-{digest_texts(key(row))}.png"


def picture_of(folder: Path, row: Row) -> Image.Image:
    """The picture of a row, in RGB."""
    with Image.open(picture_path(folder, row)) as file:
        return file.convert("RGB")


def save_picture(image: Image.Image, path: Path) -> None:
    """Save a picture, creating its folder first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
