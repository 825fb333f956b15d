"""One LoRA of a library: what is known about it, and from which files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from mole_diffusers.lora import Expert, read_expert
from mole_diffusers.lora.metadata import summarize, training_tags
from mole_diffusers.lora.safe_files import RefusedFileError, path_inside
from mole_diffusers.lora.sidecars import NOTES
from mole_diffusers.options import check_kinds

SAMPLES = 20  # texts per LoRA at most, as in LoraRetriever's code
CAPTIONS_LIMIT = 1 << 20  # bytes
Stamp = tuple[int, int]  # size in bytes and modification time in ns; (0, 0) if there is no file
Stamps = tuple[Stamp, Stamp, Stamp]


@dataclass(frozen=True)
class LibraryEntry:
    """One LoRA of a library.

    Attributes:
        name: the file name without suffix; in a subfolder with the folder, "people/anna".
        file: path relative to the library's folder.
        base: the model family it was made for.
        triggers: its trigger words; none if its file only gives training tags, which are in `samples`.
        samples: texts it was trained with, or that describe it.
        sha256: of its tensors.
        stamps: of the LoRA file, its captions file and its notes: a cheap way to notice changes.
    """

    name: str
    file: str
    base: str
    triggers: tuple[str, ...]
    samples: tuple[str, ...]
    sha256: str
    stamps: Stamps

    def same_content(self, other: LibraryEntry) -> bool:
        """Whether both describe the same LoRA in the same way, whatever the stamps of their files."""
        mine, theirs = ((e.base, e.triggers, e.samples, e.sha256) for e in (self, other))
        return mine == theirs


def read_entry(folder: Path, file: str) -> tuple[LibraryEntry, Expert]:
    """Read one LoRA of a folder.

    Its samples are the lines of the text file next to it ("fox.txt" for "fox.safetensors"), or else kohya's training
    tags, ModelSpec's title and description, the triggers, or the file name.

    Raises ValueError if the file is not a LoRA or lies outside the folder.
    """
    path, captions = path_inside(folder, file), _beside(folder, file, ".txt")
    before = stamps(folder, file)  # taken before reading, so that a change during it is noticed next time
    name = file.removesuffix(".safetensors")
    expert = read_expert(path, name)
    summary = summarize(expert.metadata)
    samples = (
        _lines(captions)
        or training_tags(expert.metadata)
        or tuple(summary[key] for key in ("title", "description") if key in summary)
        or expert.triggers
        or (name.rpartition("/")[2].replace("_", " ").replace("-", " "),)
    )
    return LibraryEntry(name, file, expert.base, expert.triggers, samples[:SAMPLES], expert.sha256, before), expert


def stamps(folder: Path, file: str) -> Stamps:
    """The stamps of a LoRA, of its captions (.txt), and of the notes beside it (see `lora.sidecars`), all together."""
    notes = [_stamp(_beside(folder, file, ending)) for ending in NOTES]
    together = sum(size for size, _ in notes), max(time for _, time in notes)
    return _stamp(path_inside(folder, file)), _stamp(_beside(folder, file, ".txt")), together


def _beside(folder: Path, file: str, suffix: str) -> Path:
    return path_inside(folder, file.removesuffix(".safetensors") + suffix)


def _stamp(path: Path) -> Stamp:
    if not path.is_file():
        return 0, 0
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    if path.stat().st_size > CAPTIONS_LIMIT:
        raise RefusedFileError(f"{path} is too large: captions may have at most {CAPTIONS_LIMIT} bytes")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeError:
        raise RefusedFileError(f"{path} is not UTF-8 text") from None
    return tuple(line.strip() for line in lines if line.strip())


def entry_from_json(value: Mapping[str, Any]) -> LibraryEntry:
    """An entry from an index file; ValueError if a field is missing or has the wrong type."""
    kinds = get_type_hints(LibraryEntry)
    own = {name: value.get(name) for name in kinds}
    check_kinds(own, kinds, f"the entry {own['name']!r}")
    marks: Any = own["stamps"]
    if [len(mark) for mark in marks] != [2, 2, 2]:
        raise ValueError(f"stamps of the entry {own['name']!r} are not three pairs of numbers")
    texts: Any = {name: tuple(value[name]) for name in ("triggers", "samples")}
    return LibraryEntry(**own | texts | {"stamps": tuple(map(tuple, marks))})
