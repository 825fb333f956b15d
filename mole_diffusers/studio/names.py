"""Names of files in folders, and finding one of them as people type it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
FOLDER = "#"  # before the hash of a folder, see `shared_name`
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


def is_hub_id(base: str) -> bool:
    """Whether this can only be OWNER/NAME on the hub, and no file or folder."""
    path = Path(base)
    is_path = path.is_absolute() or path.suffix in (".safetensors", ".ckpt") or os.path.exists(base)
    return base.count("/") == 1 and not is_path and not base.startswith(FOLDER)


def model_name(base: str) -> str:
    """A base model's name without where it lies: a hub id as it is, of a file or a folder its own name."""
    return base if is_hub_id(base) else own_name(Path(base))


def shared_name(base: str) -> str:
    """What a picture says of its base model: a hub id as it is; of a file or a folder its name after a hash of where it
    lies, which tells nobody else the folder, and tells two files of one name on a machine apart. Twice is as once."""
    path = Path(base)
    if base == path.name or base.startswith(FOLDER) or is_hub_id(base):
        return base
    return f"{FOLDER}{hashlib.sha256(str(path.parent.absolute()).encode()).hexdigest()[:8]}/{path.name}"


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
