"""Rows of finished runs, packed into the repository: tables can be made again, and a run goes on where another ended."""

import gzip
import json
from collections import Counter
from pathlib import Path

from mole_diffusers.evaluation.rows import Rows

KEPT = Path(__file__).parent / "rows"


def pack(rows: Rows, name: str) -> None:
    """Write all rows to rows/NAME.jsonl.gz, the same bytes for the same rows.

    Raises ValueError if an arm has two rows of one picture, with different gates or settings; delete the outdated ones.
    """
    found = rows.read()
    counts = Counter((row["arm"], row["case"], row["prompt"], row["seed"]) for row in found)
    if twice := sorted({arm for (arm, *_), count in counts.items() if count > 1}):
        raise ValueError(f"{rows.folder}: {twice} have rows of the same pictures with different settings")
    lines = sorted(json.dumps(row, sort_keys=True) for row in found)
    if lines:
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))


def unpacked(folder: Path) -> Path:
    """`folder`, after unpacking the rows of its name into it; rows that were drawn since then stay."""
    packed, path = KEPT / f"{folder.name}.jsonl.gz", folder / "rows-kept.jsonl"
    if packed.exists() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress(packed.read_bytes()))
    return folder
