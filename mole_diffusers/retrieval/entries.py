"""What a library knows of one LoRA, and where it takes that from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from mole_diffusers.lora import Expert, read_expert
from mole_diffusers.lora.metadata import summarize, training_tags
from mole_diffusers.lora.safe_files import RefusedFileError, inside

SAMPLES = 20  # texts that stand for a LoRA at most, as in LoraRetriever's code
SIDECAR_LIMIT = 1 << 20  # bytes
Stamp = tuple[int, int]  # bytes and time of change; (0, 0) where there is no file
Stamps = tuple[Stamp, Stamp, Stamp]


@dataclass(frozen=True)
class LibraryEntry:
    """One LoRA of a library.

    Attributes:
        name: the file without folder and suffix; of files in subfolders with the folder, "people/anna".
        file: relative to the library's folder.
        base: the family it was made for.
        triggers: words that call it.
        samples: texts that it was trained with or that describe it.
        sha256: of its tensors.
        stamps: of the file, and of the captions and the note beside it, to see cheaply whether they changed.
    """

    name: str
    file: str
    base: str
    triggers: tuple[str, ...]
    samples: tuple[str, ...]
    sha256: str
    stamps: Stamps

    def same(self, other: LibraryEntry) -> bool:
        """Whether both say the same of the LoRA, whenever the files were written."""
        mine, theirs = ((c.base, c.triggers, c.samples, c.sha256) for c in (self, other))
        return mine == theirs


def read_entry(folder: Path, file: str) -> tuple[LibraryEntry, Expert]:
    """Read one LoRA of a folder. Its samples are the lines of the text file beside it ("fox.txt" for "fox.safetensors"),
    else kohya's training tags, ModelSpec's title and description, the triggers, or the file's name.

    Raises ValueError for a file that is no LoRA, or lies outside the folder.
    """
    path, captions = inside(folder, file), _beside(folder, file, ".txt")
    taken = stamps(folder, file)  # before reading: what changes meanwhile is seen next time
    name = file.removesuffix(".safetensors")
    expert = read_expert(path, name)
    samples = (
        _lines(captions)
        or training_tags(expert.metadata)
        or _described(expert.metadata)
        or expert.triggers
        or (_plain(name),)
    )
    return LibraryEntry(name, file, expert.base, expert.triggers, samples[:SAMPLES], expert.sha256, taken), expert


def stamps(folder: Path, file: str) -> Stamps:
    """The stamps of a LoRA, of its captions, and of the note in which A1111 keeps its triggers."""
    return _stamp(inside(folder, file)), _stamp(_beside(folder, file, ".txt")), _stamp(_beside(folder, file, ".json"))


def _beside(folder: Path, file: str, suffix: str) -> Path:
    return inside(folder, file.removesuffix(".safetensors") + suffix)


def _stamp(path: Path) -> Stamp:
    if not path.is_file():
        return 0, 0
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    with path.open("rb") as file:
        raw = file.read(SIDECAR_LIMIT + 1)
    if len(raw) > SIDECAR_LIMIT:
        raise RefusedFileError(f"{path} is too large: at most {SIDECAR_LIMIT} bytes of samples are read")
    try:
        lines = raw.decode().splitlines()
    except UnicodeError:
        raise RefusedFileError(f"{path} is not UTF-8 text") from None
    return tuple(line.strip() for line in lines if line.strip())


def _described(metadata: Mapping[str, str]) -> tuple[str, ...]:
    about = summarize(metadata)
    return tuple(about[key] for key in ("title", "description") if key in about)


def _plain(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ").replace("-", " ")


def entry_from_json(value: Any) -> LibraryEntry:
    """A card as an index has it; ValueError where a field is missing or of another kind."""
    names = ("name", "file", "base", "sha256")
    if not isinstance(value, dict) or not all(isinstance(value.get(n), str) for n in names):
        raise ValueError("an entry lacks name, file, base or sha256")
    triggers, samples, marks = (value.get(n) for n in ("triggers", "samples", "stamps"))
    if not _list_of(triggers, str) or not _list_of(samples, str):
        raise ValueError(f"the triggers or samples of {value['name']!r} are not lists of texts")
    if not _list_of(marks, list) or [len(m) for m in marks] != [2, 2, 2] or not all(_list_of(m, int) for m in marks):
        raise ValueError(f"the stamps of {value['name']!r} are not three pairs of numbers")
    own, captions, note = ((size, time) for size, time in marks)
    texts = (tuple(triggers), tuple(samples))
    return LibraryEntry(value["name"], value["file"], value["base"], *texts, value["sha256"], (own, captions, note))


def _list_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(type(item) is kind for item in value)
