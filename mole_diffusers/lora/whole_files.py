"""Files and folders that are there whole: whoever reads meets the old or the new, whenever the writer was broken off."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; when the block is over it takes its place. After an error `path` is as before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file, in UTF-8."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to write to; when the block is over it takes the place of `path`. After an error `path` is as before.

    Between two renames `path` is missing for a moment; `whole_folder` finds the old one then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{path.name[:100]}.", dir=path.parent))
    try:
        part.chmod(0o777 & ~_umask())
        yield part
        if path.is_dir():
            shutil.rmtree(_aside(path), ignore_errors=True)
            path.rename(_aside(path))
        part.rename(path)
        shutil.rmtree(_aside(path), ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def whole_folder(path: Path) -> Path:
    """`path`, or the old one that `new_folder` had put aside when it was broken off."""
    return _aside(path) if not path.exists() and _aside(path).is_dir() else path


def link_missing(old: Path, new: Path, *, without: str) -> None:
    """Give the folder `new` the files of `old` that it lacks, but for the folder `without` at its top."""
    for file in old.rglob("*"):
        inside = file.relative_to(old)
        if file.is_dir() or inside.parts[0] == without or (new / inside).exists():
            continue
        (new / inside).parent.mkdir(parents=True, exist_ok=True)
        os.link(file, new / inside, follow_symlinks=False)


@contextmanager
def only_run(folder: Path | None) -> Iterator[None]:
    """Keep a second run out of a folder while the block runs. Raises ValueError where there is one; a killed one is none."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another run is writing to {folder}; wait for it, or use another folder") from None


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.old")


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask
