"""Write files and folders as a whole: readers see the old or the new one, even if the writer was interrupted."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

__all__ = ["new_file", "new_folder", "only_run", "write_text"]

LOCK = ".lock"
WEIGHTS = re.compile(r"(?P<name>.+?)(-\d+-of-\d+)?\.(safetensors|bin)(\.index(?P<variant>\.[^.]+)?\.json)?")
LONGEST = 200  # bytes of a name that another is derived from; file systems allow 255


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A path to write to. When the block ends, it replaces `path`; after an error `path` is as before."""
    path = Path(path).resolve()  # a link stays a link
    with _folder_beside(path) as folder:
        yield (new := folder / path.name)
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file, in UTF-8."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to write to. When the block ends, it replaces `path`; after an error `path` is as before.

    Between two renames, `path` is missing for a moment; `whole_folder` then finds the old one.

    Raises:
        FileExistsError: `path` is a file.
        ValueError: `path` is the current directory, or holds it: it would be gone for this process.
    """
    path = Path(path).resolve()
    check_no_file(path)
    if Path.cwd().is_relative_to(path):
        raise ValueError(f"{path} is where this process runs, so it cannot be replaced; give another folder, or one inside")
    aside = _aside(path)
    with _folder_beside(path) as folder:
        new = folder / path.name
        new.mkdir()
        if path.is_dir():
            shutil.copymode(path, new)
        yield new
        if path.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        try:
            new.rename(path)
        except BaseException:
            if aside.is_dir():
                aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder next to `path`, so on the same disk, until the block ends. A process that is killed leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".part", dir=path.parent) as folder:
        yield Path(folder)


def whole_folder(path: Path) -> Path:
    """`path`, or the old folder that `new_folder` had put aside when it was interrupted."""
    aside = _aside(path.resolve())
    return aside if not path.exists() and aside.is_dir() else path


def copy_missing(old: Path, new: Path, *, without: str) -> None:
    """Copy the files and links of folder `old` that `new` lacks, except `without` at the top level.

    Weights that `new` has are not copied in other shards or another format: these could be read instead.
    """
    written = {weights for file in new.rglob("*") if (weights := _weights(file.relative_to(new))) is not None}
    for file in old.rglob("*"):
        inside = file.relative_to(old)
        target = new / inside
        is_folder = file.is_dir() and not file.is_symlink()
        if is_folder or inside.parts[0] == without or os.path.lexists(target) or _weights(inside) in written:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target, follow_symlinks=False)  # the same bytes, at once
        except OSError:  # a disk without hard links
            shutil.copy2(file, target, follow_symlinks=False)


def _weights(file: Path) -> Path | None:
    """The weights that a file holds whole or in part, or is the index of: "unet/diffusion_pytorch_model.fp16" for
    unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors.
    """
    found = WEIGHTS.fullmatch(file.name)
    return found and file.with_name(found["name"] + (found["variant"] or ""))


@contextmanager
def only_run(folder: Path | None) -> Iterator[None]:
    """Keep a second run out of a folder while the block runs. Raises ValueError if there is one; a killed run does not
    count.
    """
    if folder is None:
        yield
        return
    check_no_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another run is writing to {folder}; wait for it, or use another folder") from None


def check_no_file(folder: Path) -> None:
    """Raises FileExistsError, with a full sentence, if there is a file where a folder should be."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, where a folder is to be written; give the name of a folder")


def _aside(path: Path) -> Path:
    short = path.name if len(path.name.encode()) <= LONGEST else hashlib.sha256(path.name.encode()).hexdigest()[:32]
    return path.with_name(f".{short}.old")
