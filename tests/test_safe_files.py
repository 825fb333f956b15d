"""Files from strangers are read by content: good ones bit for bit, bad ones refused with the sentence that says why."""

import base64
import hashlib
import io
import json
import pickle
import struct
import zlib

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import _TYPES, load_file, save, save_file

from mole_app.studio import infotext
from mole_diffusers.binding.as_text import MASK, read_mask
from mole_diffusers.safe_files import (
    DTYPES,
    MAX_HEADER,
    MAX_TENSORS,
    RefusedFileError,
    path_inside,
    read_json,
    read_picture,
    read_safetensors,
)

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def raw(header, data=b"\0" * 8):
    """The bytes of a safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_tensors_metadata_and_hash_are_those_of_the_library(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2, 2, 1, 1).half(), "c": torch.tensor(4.0), "e": torch.empty(0, 3)}
    tensors |= {name: torch.ones(2, 3).to(_TYPES[name]) for name in DTYPES}
    save_file(tensors, tmp_path / "x.bin", {"who": "me"})
    contents, bytes_ = read_safetensors(tmp_path / "x.bin"), (tmp_path / "x.bin").read_bytes()
    for key, tensor in load_file(tmp_path / "x.bin").items():
        assert contents.tensors[key].dtype == tensor.dtype
        assert contents.tensors[key].shape == tensor.shape
        assert torch.equal(contents.tensors[key].float(), tensor.float())
    header = json.loads(bytes_[8 : 8 + struct.unpack("<Q", bytes_[:8])[0]])
    del header["__metadata__"]
    assert list(contents.tensors) == sorted(header, key=lambda name: header[name]["data_offsets"])
    assert set(contents.tensors) == set(tensors)
    assert contents.metadata == {"who": "me"}
    assert contents.sha256 == hashlib.sha256(bytes_[8 + struct.unpack("<Q", bytes_[:8])[0] :]).hexdigest()


def torch_zip():
    torch.save({"a": torch.ones(2)}, buffer := io.BytesIO())
    return buffer.getvalue()


GOOD = save({"a": torch.ones(2, 3), "b": torch.ones(4)})
BAD = {
    "empty": (b"", "is empty"),
    "cut in the length": (GOOD[:5], "is truncated"),
    "cut in the header": (GOOD[:40], "is truncated: its header"),
    "cut in the tensors": (GOOD[:-4], "is damaged or truncated: incomplete metadata, file not fully covered"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "is a Git LFS pointer"),
    "html page": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is an HTML page"),
    "zip": (torch_zip(), "is a zip archive"),
    "pickle": (pickle.dumps({"a": 1}, protocol=2) + b" " * 99, "is a pickle"),
    "something else": (b"GGUF" + b"\0" * 80, "is not a safetensors file"),
    "zeros": (b"\0" * 80, "is not a safetensors file"),
    "header size": (struct.pack("<Q", MAX_HEADER + 1) + b"{" * 99, f"its header claims {MAX_HEADER + 1} bytes"),
    "huge header size": (struct.pack("<Q", 2**64 - 1) + b"{" * 99, "its header claims"),
    "entry count": (raw({f"{i}": EMPTY for i in range(MAX_TENSORS + 1)}, b""), f"lists {MAX_TENSORS + 1} tensors"),
    "brackets": (raw(b'{"a":' + b"[]," * 600_000), "brackets and colons"),
    "nesting": (raw(b'{"a":' * 100_000), "nested too deeply"),
    "nested metadata": (
        raw({"__metadata__": {"a": {"b": "c"}}}),
        "invalid type: map, expected a string",
    ),
    "past the end": (raw({"a": ONE | {"shape": [4], "data_offsets": [0, 16]}}), "is damaged or truncated: incomplete"),
    "overlap": (raw({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, b"\0" * 12), "invalid offset for tensor `b`"),
    "hole": (raw({"a": ONE, "b": ONE | {"data_offsets": [12, 20]}}, b"\0" * 20), "invalid offset for tensor `b`"),
    "trailing bytes": (GOOD + b"\0", "is damaged or truncated: incomplete"),
    "duplicate key": (raw(b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2)), "the key 'a' is there twice"),
    "size and shape": (raw({"a": ONE | {"shape": [3]}}), "invalid shape, data type, or offset"),
    "overflow": (raw({"a": ONE | {"shape": [2**40, 2**40]}}), "overflow computing buffer size"),
    "huge and empty": (raw({"a": ONE | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}), "overflow computing"),
    "long name": (raw({"oft_" * 150: ONE}), "the name of a tensor has 600 characters; at most 500 are read"),
    "negative shape": (raw({"a": ONE | {"shape": [-2]}}), "expected usize"),
    "boolean shape": (raw({"a": ONE | {"shape": [True, 2]}}), "expected usize"),
    "sides without a stride": (
        raw({"a": ONE | {"shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}, b""),
        "as no tensor can have",
    ),
    "many dimensions": (raw({"a": ONE | {"shape": [1] * 99 + [2]}}), "has 100 sides; at most 8 are read"),
    "backward offsets": (raw({"a": ONE | {"data_offsets": [8, 0]}}), "invalid offset for tensor `a`"),
    "dtype": (raw({"a": ONE | {"dtype": "U32"}}), "has dtype 'U32'"),
    "unknown dtype": (raw({"a": ONE | {"dtype": "X9"}}), "unknown variant"),
    "no dtype": (raw({"a": {"shape": [2], "data_offsets": [0, 8]}}), "missing field `dtype`"),
    "not an object": (raw(b"{}"[:1] + b"1}"), "its header is not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid UTF-8"),
    "half a surrogate pair": (raw(b'{"\\ud800": 1}'), "not valid UTF-8"),
    "NaN in the header": (raw(b'{"a": NaN}'), "NaN is not a finite number"),
    "long number": (raw(b'{"a": %s}' % (b"9" * 9999)), "is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.shows("Files")
def test_bad_files_are_refused_with_their_reason(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(RefusedFileError, match=f"x.safetensors.*{message}"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.shows("Files")
def test_a_file_larger_than_free_memory_is_refused_before_it_is_read(tmp_path):
    size = psutil.virtual_memory().total
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "x").open("wb") as file:  # sparse: no byte of it is stored
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(RefusedFileError, match="free memory"):
        read_safetensors(tmp_path / "x")


def test_no_file_is_a_missing_file(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file at"):
            read_safetensors(path)
        with pytest.raises(FileNotFoundError, match="no file at"):
            read_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"<html>", "is not JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b"[1, Infinity]", "Infinity is not a finite number"),
        (b"[1e999]", "1e999 is not a finite number"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 50_000, "nested too deeply"),
        (b"[" * 9 + b"]" * 9, "nested too deeply"),
        (b" " * 1025, "too large"),
    ],
)
@pytest.mark.shows("Files")
def test_bad_json_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RefusedFileError, match=f"x.json.*{message}"):
        read_json(tmp_path / "x.json", limit=1024 if b"  " in content else 1 << 20)


def test_json_that_is_good(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": [1, {"b": "ü"}]}))
    assert read_json(tmp_path / "x.json") == {"a": [1, {"b": "ü"}]}


@pytest.mark.parametrize("kind", [b"iCCP", b"gAMA", b"cHRM", b"tRNS"])
@pytest.mark.shows("Files")
def test_a_part_after_the_pixels_that_lacks_its_data_is_a_broken_picture(tmp_path, kind):
    """Pillow raises an error of its own for each of them, and only where it has opened the picture already."""
    Image.new("L", (4, 4)).save(file := io.BytesIO(), "PNG")
    pixels, end = file.getvalue()[:-12], file.getvalue()[-12:]
    part = pixels + struct.pack(">I4sBI", 1, kind, 0, zlib.crc32(kind + b"\0")) + end
    (tmp_path / "x.png").write_bytes(part)
    with pytest.raises(ValueError, match="a mask is a PNG in base64"):
        read_mask(MASK + base64.b64encode(part).decode())
    with pytest.raises(ValueError, match="x.png is not a PNG that can be read"):
        infotext.read(tmp_path / "x.png")
    with pytest.raises(RefusedFileError, match="it cannot be read as a picture"):
        read_picture(tmp_path / "x.png", "it")


@pytest.mark.shows("Files")
def test_an_index_names_files_inside_its_folder_only(tmp_path):
    folder = tmp_path / "library"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.safetensors").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "sub" / "near").symlink_to(folder / "sub" / "a.safetensors")
    (folder / "loop").symlink_to(folder / "loop")
    assert path_inside(folder, "sub/a.safetensors") == (folder / "sub" / "a.safetensors").resolve()
    assert path_inside(folder, "sub/near") == (folder / "sub" / "a.safetensors").resolve()
    assert path_inside(folder, "dra:gon,1.safetensors").parent == folder.resolve()
    bad = ["", None, 3, "/etc/passwd", "../secret", "sub/../../secret", "C:\\x", "a\\b", "c:x", "a\0b", "link", "loop"]
    for name in bad:
        with pytest.raises(RefusedFileError, match="in the index of"):
            path_inside(folder, name)
