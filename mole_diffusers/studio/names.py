"""Names of files in folders, and finding one of them as people type it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
FEW = 8  # so many names are listed in a message; of more, only the closest


def by_name(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """{name: path}, in the order of the names: the file's or folder's own, or where two are alike ("fox"), with the folder
    that each is in ("people/fox", "animals/fox")."""
    inside = {path: path.relative_to(folder).with_name(own_name(path)).as_posix() for path in paths}
    return dict(sorted(short_names({path: own_name(path) for path in inside}, inside).items()))


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders, also of those that are links; of each folder once, whatever links to it."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=lambda name: (Path(root, name).is_symlink(), name))
        yield from (Path(root, name) for name in names)


def own_name(path: Path) -> str:
    """The name of a folder, and of a safetensors file without its suffix."""
    return path.name.removesuffix(".safetensors")


def short_names(short: Mapping[T, str], long: Mapping[T, str]) -> dict[str, T]:
    """{name: thing}: the short name of each, or its long one where another's is alike in any case."""
    count = Counter(name.casefold() for name in short.values())
    return {name if count[name.casefold()] == 1 else long[thing]: thing for thing, name in short.items()}


def matching(name: str, known: Collection[str]) -> str | None:
    """The known name that is meant: this one, or the only one that differs from it in case alone; None if there is none."""
    if name in known:
        return name
    alike = [each for each in known if each.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def known_names(name: str, known: Collection[str]) -> str:
    """What a message says about the names that are known: all of a few, or of more the closest to `name` and the count."""
    if len(known) <= FEW:
        return f"known: {', '.join(known) or 'none'}"
    by_lower = {each.casefold(): each for each in known}
    close = [by_lower[each] for each in get_close_matches(name.casefold(), by_lower, n=5, cutoff=0.5)]
    return f"closest of {len(known)}: {', '.join(close)}" if close else f"none of the {len(known)} is like it"
