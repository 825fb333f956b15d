"""Names for the files in folders, and finding a file by a name as people type it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
WORLD = "emoji"  # the name of the embedded world as a base
FOLDER = "#"  # precedes the hash of a folder, see `shared_name`
FEW = 8  # a message lists up to this many names; if there are more, only the closest


def by_name(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """{name: path}, sorted by name.

    The name is that of the file or folder ("fox"). If two are the same, each gets its folder ("people/fox", "animals/fox").
    """
    inside = {path: path.relative_to(folder).with_name(own_name(path)).as_posix() for path in paths}
    return dict(sorted(short_names({path: own_name(path) for path in inside}, inside).items()))


def is_text(name: str) -> bool:
    """Whether the name of a file is UTF-8. Others can be neither shown nor saved."""
    return name.encode(errors="ignore").decode() == name


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders. Links to folders are followed, but each folder is read once.

    Names that are not UTF-8 are left out.
    """
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(is_text, folders), key=lambda name: (Path(root, name).is_symlink(), name))
        yield from (Path(root, name) for name in names if is_text(name))


def own_name(path: Path) -> str:
    """The name of a folder or file, without the suffix of a safetensors file."""
    return path.name.removesuffix(".safetensors")


def is_hub_id(base: str) -> bool:
    """Whether this can only be OWNER/NAME on the hub, not a file or folder."""
    path = Path(base)
    is_path = path.is_absolute() or path.suffix in (".safetensors", ".ckpt") or os.path.exists(base)
    return base.count("/") == 1 and not is_path and not base.startswith(FOLDER)


def model_name(base: str) -> str:
    """A base model's name without its path: the name of a file or folder; a hub id is left as it is."""
    return base if is_hub_id(base) else own_name(Path(base))


def shared_name(base: str) -> str:
    """The name of a base model that is saved in pictures: a hub id as it is, or the name of a file or folder after a hash of
    the folder that it is in.

    The hash tells apart two files of the same name on a machine, and does not show others your folders. A name that is
    already shared stays as it is.
    """
    path = Path(base)
    if base == path.name or base.startswith(FOLDER) or is_hub_id(base):
        return base
    return f"{FOLDER}{hashlib.sha256(str(path.parent.absolute()).encode()).hexdigest()[:8]}/{path.name}"


def short_names(short: Mapping[T, str], long: Mapping[T, str]) -> dict[str, T]:
    """{name: thing}: the short name of each thing, or its long name if two short names are the same in any case."""
    count = Counter(name.casefold() for name in short.values())
    return {name if count[name.casefold()] == 1 else long[thing]: thing for thing, name in short.items()}


def matching(name: str, known: Collection[str]) -> str | None:
    """The known name that equals this one, or the only one that differs just in upper and lower case, or None."""
    if name in known:
        return name
    alike = [each for each in known if each.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def matching_lora(name: str, known: Collection[str]) -> str | None:
    """The known LoRA of this name, given in any case and with _ for spaces, or None."""
    return matching(name, known) or matching(name.replace("_", " "), known)


def known_names(name: str, known: Collection[str]) -> str:
    """The part of a message that lists the known names: all if they are few, else the closest to `name` and the count."""
    if len(known) <= FEW:
        return f"known: {', '.join(known) or 'none'}"
    by_lower = {each.casefold(): each for each in known}
    close = [by_lower[each] for each in get_close_matches(name.casefold(), by_lower, n=5, cutoff=0.5)]
    return f"closest of {len(known)}: {', '.join(close)}" if close else f"none of the {len(known)} is like it"
