"""Read untrusted files: safetensors, JSON and pictures, judged by content. Every size is checked before memory is allocated.

One error type, RefusedFileError, says what is wrong with a file. A file that exists raises no other error.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

__all__ = [
    "PICTURE_ERRORS",
    "RefusedFileError",
    "TensorFile",
    "json_lines",
    "parse_json",
    "pipeline_class",
    "printable",
    "read_header",
    "read_json",
    "read_picture",
    "read_safetensors",
]

MAX_HEADER = 8 << 20  # bytes; far more than a LoRA's header with all training tags and a thumbnail
MAX_TENSORS = 20_000
MAX_MARKS = 500_000  # opening brackets and colons; keeps parsing a header cheap whatever it contains
MAX_NAME = 500  # characters of a tensor's name; keeps reading a name cheap
MAX_DIMS = 8
MOST_NUMBERS = 1 << 56  # of a tensor without its empty sides; PyTorch can make no strides for more
MAX_MESSAGE = 1000  # characters of an error message
MAX_DEPTH = 8  # of nested lists and objects in a JSON file
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]  # of pictures
PICTURE_ERRORS = (  # what Pillow raises for a broken picture: of its parts after the pixels, whatever reading them raises
    OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, struct.error, Image.DecompressionBombError,
)  # fmt: skip

HTML = (b"<!doctype", b"<html", b"<head", b"<?xml")
OTHER_KINDS = {  # how files begin that are no safetensors, in lower case -> what they are
    (b"version https://git-lfs",): "a Git LFS pointer, not the file itself; fetch that with `git lfs pull`",
    HTML: "an HTML page, as a download without the needed login leaves; download it again",
    (b"pk",): "a zip archive, as PyTorch's pickle files are, which can run code; only safetensors are read",
    (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"): "a pickle, which can run code; only safetensors are read",
}
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")


def printable(text: str) -> str:
    """Untrusted text on one line, without terminal control codes."""
    return "".join(c if c.isprintable() else " " for c in text)


class RefusedFileError(ValueError):
    """An untrusted file that is not what it should be. The message, one line, names the file and the problem."""

    def __init__(self, message: str):
        # The message quotes the file, which may contain anything, at any length.
        super().__init__(printable(message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."))


@dataclass(frozen=True)
class TensorFile:
    """The contents of one safetensors file."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    sha256: str  # of the tensor bytes after the header, so that edited metadata does not change it


def read_safetensors(path: str | Path) -> TensorFile:
    """Read a whole safetensors file; the content decides, not the suffix. Pickle is never loaded.

    Raises:
        FileNotFoundError: no such file.
        RefusedFileError: empty, a Git LFS pointer, an HTML page, a zip or pickle; a header too large, with too many tensors
            or duplicate keys; what safetensors itself refuses, such as a truncated file; more than the free memory.
    """
    path = Path(path)
    shapes, metadata = read_header(path)
    size = path.stat().st_size
    stacked = sum(4 * math.prod(shape) for shape in shapes.values())  # experts are stacked in fp32
    check_memory(size + stacked, f"{path}, once read and once stacked for the host, takes")
    data = path.read_bytes()
    try:
        tensors = load(data)  # in any order
    except SafetensorError:
        tensors = {}
    if tensors.keys() != shapes.keys():
        raise RefusedFileError(f"{path} changed while it was read")
    start = 8 + int.from_bytes(data[:8], "little")
    return TensorFile({key: tensors[key] for key in shapes}, metadata, hashlib.sha256(memoryview(data)[start:]).hexdigest())


def read_header(path: str | Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shape of every tensor of a safetensors file of any size, in the order of their bytes, and its metadata. Raises
    like `read_safetensors`."""
    path = Path(path)
    values = _header(path)
    try:
        with safe_open(path, "numpy") as file:  # checks types, shapes and offsets
            metadata = file.metadata() or {}
    except SafetensorError as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise RefusedFileError(f"{path} is damaged or truncated: {why}") from None
    values.pop("__metadata__", None)
    if len(values) > MAX_TENSORS:
        raise RefusedFileError(f"{path}: its header lists {len(values)} tensors; at most {MAX_TENSORS} are read")
    for key, about in values.items():
        shape, dtype = about["shape"], about["dtype"]
        if len(key) > MAX_NAME:
            why = f"the name of a tensor has {len(key)} characters; at most {MAX_NAME} are read"
        elif len(shape) > MAX_DIMS:
            why = f"tensor {key!r} has {len(shape)} sides; at most {MAX_DIMS} are read"
        elif math.prod(side or 1 for side in shape) > MOST_NUMBERS:  # one side may be 0, so that it has no bytes
            why = f"tensor {key!r} has the sides {shape}, as no tensor can have"
        elif dtype not in DTYPES:
            why = f"tensor {key!r} has dtype {dtype!r}; known: {list(DTYPES)}"
        else:
            continue
        raise RefusedFileError(f"{path}: {why}")
    in_order = sorted(values.items(), key=lambda each: each[1]["data_offsets"])
    return {key: tuple(about["shape"]) for key, about in in_order}, metadata


def read_json(path: str | Path, *, limit: int = 1 << 20) -> Any:
    """Parse a JSON file of at most `limit` bytes.

    Raises:
        FileNotFoundError: no such file.
        RefusedFileError: too large, not UTF-8, not JSON, a duplicate key, NaN, or nested too deeply.
    """
    path = Path(path)
    with _open(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise RefusedFileError(f"{path} is too large: JSON of at most {limit} bytes is read")
    value = parse_json(raw, str(path))
    if _deeper_than(value, MAX_DEPTH):
        raise RefusedFileError(f"{path} is nested too deeply: at most {MAX_DEPTH} levels are read")
    return value


def parse_json(raw: bytes | str, where: str) -> Any:
    """JSON text -> value; RefusedFileError, whose message begins with `where`, for anything else."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair can be parsed but not printed
    except RecursionError:
        raise RefusedFileError(f"{where} is nested too deeply") from None
    except UnicodeError:
        raise RefusedFileError(f"{where} is not JSON: it is not valid UTF-8 text") from None
    except ValueError as error:
        raise RefusedFileError(f"{where} is not JSON: {error}") from None
    return value


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each value of a file of JSON lines, and where it is ("cases.jsonl, line 1"). Empty lines are left out.

    Raises RefusedFileError for a line that is not JSON.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # a text in JSON may hold other ends of lines
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, f"{where},")


def pipeline_class(index: Any, source: str) -> str:
    """The pipeline class that a model_index.json names. Raises RefusedFileError, naming `source`, if it names none."""
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str):
        raise RefusedFileError(f"{source} is no saved pipeline: its model_index.json must name a _class_name, a text")
    return name


def read_picture(path: Path, what: str, *, most: float = math.inf) -> Image.Image:
    """The picture in a file, turned upright as its EXIF data say.

    Args:
        what: the name of the file in error messages.
        most: the largest number of pixels; by default as many as Pillow unpacks.

    Raises RefusedFileError if the file is not a picture or has too many pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if (pixels := image.width * image.height) <= most:
                return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except PICTURE_ERRORS as error:
        why = str(error).replace(f"{path.parent}/", "")  # visitors are not told where their files lie
        raise RefusedFileError(f"{what} cannot be read as a picture: {why}") from error
    raise RefusedFileError(f"{what} has {pixels} pixels, more than {most:.0f}")


def path_inside(folder: str | Path, name: Any) -> Path:
    """The path of a file that an index names: a relative path that stays inside `folder` with symbolic links resolved.

    Raises RefusedFileError for an absolute path, "..", a drive, a backslash, or a link that leads out.
    """
    about = f"the file name {name!r} in the index of {folder}"
    if not isinstance(name, str) or not name or any(c in name for c in "\\\0") or name[1:2] == ":":
        raise RefusedFileError(f"{about} is not a relative path")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise RefusedFileError(f"{about} leads out of the folder")
    root = Path(folder).resolve()
    try:
        path = (root / pure).resolve()
        is_loop = path.is_symlink()  # from Python 3.13 on, resolving leaves a loop of links as it is
    except (OSError, RuntimeError):
        is_loop = True
    if is_loop:
        raise RefusedFileError(f"{about} cannot be followed")
    if not path.is_relative_to(root):
        raise RefusedFileError(f"{about} is a link that leads out of the folder")
    return path


def _open(path: Path) -> BufferedReader:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        return path.open("rb")
    except OSError as error:
        raise RefusedFileError(f"{path} cannot be opened: {error.strerror}") from None


# ---- the header


def _header(path: Path) -> dict[str, Any]:
    """The header's JSON, of limited size and without duplicate keys, which safetensors does not refuse."""
    with _open(path) as file:
        head, size = file.read(64), path.stat().st_size
        length = int.from_bytes(head[:8], "little")
        if len(head) < 9 or head[8:9] != b"{":
            raise RefusedFileError(f"{path} is {_kind(head)}")
        if length > MAX_HEADER:
            raise RefusedFileError(f"{path}: its header claims {length} bytes; at most {MAX_HEADER} are read")
        if length > size - 8:
            raise RefusedFileError(f"{path} is truncated: its header has {length} bytes, the whole file {size}")
        file.seek(8)
        raw = file.read(length)
    if (marks := raw.count(b"[") + raw.count(b"{") + raw.count(b":")) > MAX_MARKS:
        raise RefusedFileError(f"{path}: its header has {marks} brackets and colons; at most {MAX_MARKS} are read")
    values = parse_json(raw, f"{path}: its header")
    if not isinstance(values, dict):
        raise RefusedFileError(f"{path}: its header is not a JSON object")
    return values


def _kind(head: bytes) -> str:
    """What a file is instead of safetensors."""
    if not head:
        return "empty"
    for starts, what in OTHER_KINDS.items():
        if head.lstrip().lower().startswith(starts):
            return what
    return (
        f"truncated: it has {len(head)} bytes" if len(head) < 9 else "not a safetensors file, the only format that is read"
    )


def check_memory(size: int, what: str) -> None:
    """Raises RefusedFileError if `size` bytes exceed the free memory; `what` begins the message ("the experts take")."""
    if size > (free := psutil.virtual_memory().available):
        raise RefusedFileError(f"{what} {size} bytes, more than the {free} bytes of free memory")


# ---- JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def _finite(text: str) -> float:
    """JSON has no NaN and no infinity, but Python reads them, and 1e999 as one."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _deeper_than(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(each, levels - 1) for each in inner)
