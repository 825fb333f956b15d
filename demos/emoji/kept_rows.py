"""Rows of finished runs, packed into the repository: tables can be made again, and a run goes on where another ended."""

import gzip
import json
from pathlib import Path

from mole_diffusers.evaluation.rows import Rows

KEPT = Path(__file__).parent / "rows"


def pack(rows: Rows, name: str) -> None:
    """All rows as rows/NAME.jsonl.gz, the same bytes for the same rows."""
    lines = sorted(json.dumps(row, sort_keys=True) for row in rows.read())
    if lines:
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))


def unpacked(folder: Path) -> Path:
    """`folder` with the packed rows of its name in it; what was drawn since is not touched."""
    packed, path = KEPT / f"{folder.name}.jsonl.gz", folder / "rows-kept.jsonl"
    if packed.exists() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress(packed.read_bytes()))
    return folder
