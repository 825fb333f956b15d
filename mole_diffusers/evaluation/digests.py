"""Short digests of what pictures depend on: rows say by them which files a composer had."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

DIGITS = 12


def digest(parts: Iterable[bytes]) -> str:
    """The first twelve digits of SHA-256 over `parts`, each with its length, so that no part runs into the next."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:DIGITS]


def of_files(*paths: Path) -> str:
    """Of the contents of files, in the order given."""
    return digest(path.read_bytes() for path in paths)


def of_texts(*texts: str) -> str:
    """Of texts, in the order given."""
    return digest(text.encode() for text in texts)
