"""What is known about each LoRA of a library, and its index on disk: safetensors and JSON in a hidden folder beside them.

Reading checks everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import save_file

from mole_diffusers.lora import Expert, read_expert
from mole_diffusers.lora.metadata import NOTES, summarize, training_tags
from mole_diffusers.options import check_kinds
from mole_diffusers.retrieval.encoders import Encoder
from mole_diffusers.safe_files import RefusedFileError, TensorFile, path_inside, read_json, read_safetensors
from mole_diffusers.whole_files import new_file

SAMPLES = 20  # texts per LoRA at most, as in LoraRetriever's code
CAPTIONS_LIMIT = 1 << 20  # bytes


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
        stamps: what `stamps` says of its files: a cheap way to notice changes.
    """

    name: str
    file: str
    base: str
    triggers: tuple[str, ...]
    samples: tuple[str, ...]
    sha256: str
    stamps: tuple[int, ...]

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


def stamps(folder: Path, file: str) -> tuple[int, ...]:
    """Bytes and modification time in ns of a LoRA, of its captions (.txt), and of the notes beside it together; 0 without a
    file."""
    notes = [_stamp(_beside(folder, file, ending)) for ending in NOTES]
    together = sum(size for size, _ in notes), max(time for _, time in notes)
    return *_stamp(path_inside(folder, file)), *_stamp(_beside(folder, file, ".txt")), *together


def _beside(folder: Path, file: str, suffix: str) -> Path:
    return path_inside(folder, file.removesuffix(".safetensors") + suffix)


def _stamp(path: Path) -> tuple[int, int]:
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
    lists: Any = {name: tuple(value[name]) for name in ("triggers", "samples", "stamps")}
    return LibraryEntry(**own | lists)


FORMAT, VERSION = "mole_diffusers.retrieval", 1
FOLDER = ".mole_library"
ABOUT, VECTORS = f"{FOLDER}/index.json", f"{FOLDER}/index.safetensors"
FIELD_TYPES = {"encoder": str, "entries": Sequence[Mapping[str, Any]], "skipped": Mapping[str, str]}  # of the JSON
MAX_ABOUT = 256 << 20  # bytes of JSON; 10,000 entries of 20 captions take 15 MB
PROBE = ("a photo of a person", "an animal in the snow", "drawing", "red and blue")
PROBE_TOLERANCE = 0.02  # half precision and other devices stay far below it, other models far above


@dataclass(frozen=True)
class Index:
    """The contents of an index.

    Attributes:
        encoder: id of the encoder that made the embeddings.
        probe: its embeddings [P, D] of `PROBE`, which reveal another encoder with the same id.
        entries: every LoRA, in the order of the rows of `embeddings` [N, D].
        skipped: file -> why it is not an entry.
    """

    encoder: str
    probe: torch.Tensor
    entries: tuple[LibraryEntry, ...]
    embeddings: torch.Tensor
    skipped: dict[str, str]


def lora_files(folder: Path) -> list[str]:
    """Every safetensors file in a folder and its subfolders except hidden ones, as paths relative to it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    found = (path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def shown(file: str) -> str:
    """The name of a file with "?" for what is not UTF-8 in it, which can be neither shown nor saved."""
    return file.encode(errors="replace").decode()


def save(folder: Path, index: Index) -> None:
    """Write an index, each file completely or not at all. Raises RefusedFileError for links that lead out of the folder."""
    tensors = {"embeddings": index.embeddings.contiguous(), "probe": index.probe.contiguous()}
    with new_file(path_inside(folder, VECTORS)) as vectors, new_file(path_inside(folder, ABOUT)) as about:
        save_file(tensors, vectors, {"format": "pt"})
        found = {
            "format": FORMAT,
            "version": VERSION,
            "encoder": index.encoder,
            "embeddings": read_safetensors(vectors).sha256,
            "entries": [asdict(entry) for entry in index.entries],
            "skipped": index.skipped,
        }
        about.write_text(json.dumps(found, indent=1) + "\n")


def load(folder: Path, encoder: Encoder) -> Index:
    """Read an index that this encoder made.

    Raises:
        FileNotFoundError: there is none.
        RefusedFileError: it cannot be read, has another version, names files outside the folder, its two files were not
            written together, or another encoder made it, if only with the same id but other weights.
    """
    try:
        about = read_json(path_inside(folder, ABOUT), limit=MAX_ABOUT)
        vectors = read_safetensors(path_inside(folder, VECTORS))
        index = _checked(folder, about, vectors)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} has no index; make one with: mole index {folder}") from None
    except ValueError as error:
        raise reindex_error(folder, f"cannot be used: {error}") from None
    if index.encoder != encoder.id:
        raise reindex_error(folder, f"was made with another encoder ({index.encoder!r}; this one is {encoder.id})")
    probe = encoder(PROBE)
    if probe.shape != index.probe.shape or (probe - index.probe).abs().max() > PROBE_TOLERANCE:
        raise reindex_error(folder, f"was made with other weights of its encoder ({encoder.id})")
    return index


def _checked(folder: Path, about: Any, vectors: TensorFile) -> Index:
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"it is not {FORMAT} version {VERSION}")
    if about.get("embeddings") != vectors.sha256:
        raise ValueError("its two files are not from the same run")
    about = {name: about.get(name) for name in FIELD_TYPES}
    check_kinds(about, FIELD_TYPES, "the index")
    entries = tuple(entry_from_json(value) for value in about["entries"])
    for entry in entries:
        path_inside(folder, entry.file)
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError("two entries have one name")
    embeddings, probe = (vectors.tensors.get(name, torch.empty(0)) for name in ("embeddings", "probe"))
    rows, width = (len(entries), len(PROBE)), embeddings.shape[-1:]
    for tensor, count in zip((embeddings, probe), rows, strict=True):
        if tensor.shape != (count, *width) or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ValueError(f"its embeddings are not finite fp32 matrices with {rows[0]} and {rows[1]} rows of one width")
    return Index(about["encoder"], probe, entries, embeddings, about["skipped"])


def reindex_error(folder: Path, problem: str) -> RefusedFileError:
    """The error for an index that must be made again."""
    return RefusedFileError(f"the index of {folder} {problem}; make it again with: mole index {folder}")
