"""Valid files -> broken ones, for fuzzing: bytes, a safetensors header's fields, tensors, and JSON values, by hypothesis."""

import json
import struct
from copy import deepcopy

import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

HUGE = "@1e999@"  # written as the number, which JSON can say and Python reads as infinity
ODD = [
    None, True, False, 0, -1, 1, 3, 1.5, -0.5, 2**31, 2**40, 2**63, 10**400, 1e308, HUGE, "", "..", "../x", "/etc/passwd",
    "a\0b", "\ud800", "x" * 300, "x" * 3000, "NaN", "inf", "mole", "F16", "I64", [], {}, [[]], [0], [1, 2], [2**40, 0],
    [2**62, 2**62, 0], [-1, 2],
    {"a": {}}, {"r": 1}, [[[[[[[[[[]]]]]]]]]],
]  # fmt: skip
ENDS = [
    "alpha", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.default.weight", "hada_w1_a",
    "hada_t1", "lokr_w1", "lokr_w2_b", "lokr_t2", "dora_scale", "diff", "oft_blocks", "weight", "",
]  # fmt: skip
METADATA = [
    "lora_adapter_metadata", "ss_tag_frequency", "ss_base_model_version", "ss_v2", "modelspec.architecture",
    "modelspec.trigger_phrase", "modelspec.title", "format",
]  # fmt: skip
WORDS = [
    "flux1",
    "sdxl_base",
    "True",
    "a, b,,",
    "{",
    '{"a": {"b": 1e999}}',
    '{"unet.lora_alpha": 1e999}',
    "[]",
    "\x1b[2J",
    "é" * 99,
]
COUNT = st.sampled_from([1, 1, 1, 2, 3])
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool]


def place(draw, size):
    """An index into `size` things, often a small one, where a file's header is."""
    return draw(st.integers(0, max(0, min(size, 64) - 1)) | st.integers(0, max(0, size - 1)))


def bytes_mutated(draw, blob, other):
    """Any file: bytes set, cut, dropped, repeated, put in, or taken from another file."""
    kind = draw(st.sampled_from(["set", "set", "cut", "drop", "repeat", "insert", "splice"]))
    at, length = place(draw, len(blob)), draw(st.integers(1, 16))
    if kind == "set":
        return blob[:at] + bytes([draw(st.integers(0, 255))]) + blob[at + 1 :]
    if kind == "cut":
        return blob[:at]
    if kind == "drop":
        return blob[:at] + blob[at + length :]
    if kind == "repeat":
        return blob[:at] + blob[at : at + length] * 2 + blob[at + length :]
    if kind == "insert":
        return blob[:at] + draw(st.binary(min_size=1, max_size=16)) + blob[at:]
    return blob[:at] + other[place(draw, len(other)) :]


# ---- safetensors


def header_mutated(draw, blob, other):
    """A header's fields, with its length right again."""
    size = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8 : 8 + size])
    keys = [key for key in header if key != "__metadata__"]
    kind = draw(st.sampled_from(["field", "rename", "delete", "twice", "metadata", "swap", "empty"]))
    if kind == "metadata" or not keys:
        said = header.setdefault("__metadata__", {})
        said[draw(st.sampled_from(METADATA))] = deepcopy(
            draw(st.sampled_from(WORDS) | st.sampled_from(ODD) | st.text(max_size=20))
        )
        return packed(header, blob[8 + size :])
    key = keys[place(draw, len(keys))]
    if kind == "field":
        header[key][draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = deepcopy(draw(st.sampled_from(ODD)))
    elif kind == "rename":
        header[renamed(draw, key, keys)] = header.pop(key)
    elif kind == "delete":
        del header[key]
    elif kind == "empty":  # no bytes at all, whatever its other sides are
        end = len(blob) - 8 - size
        shape = draw(st.permutations([0, draw(st.sampled_from([1, 2**31, 2**62])), draw(st.sampled_from([1, 2**62]))]))
        header[renamed(draw, key, keys)] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
    elif kind == "swap":
        second = keys[place(draw, len(keys))]
        header[key], header[second] = header[second], header[key]
    text = json_text(header)
    if kind == "twice":
        text = text[:-1] + b", " + json_text({key: header[key]})[1:]
    return struct.pack("<Q", len(text)) + text + blob[8 + size :]


def renamed(draw, key, keys):
    """Another layer's name, another end, or any text at all."""
    stem = key.rpartition(".lora")[0] or key.partition(".")[0]
    return draw(
        st.sampled_from(ENDS).map(lambda end: f"{stem}.{end}")
        | st.sampled_from(keys).map(lambda other: other.replace("lora_A", "lora_down"))
        | st.text(max_size=20).map(lambda text: text + key)
        | st.just(key + "x" * 300)
        | st.text(max_size=20)
    )


def tensor_mutated(draw, blob, other):
    """A tensor's values, shape or storage."""
    tensors = load(blob)
    if not tensors:
        return other
    keys = sorted(tensors)
    key = keys[place(draw, len(keys))]
    tensor = tensors[key]
    made = {
        "fill": lambda: torch.full_like(
            tensor, draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e38, 1e11, 1e-45, 0]))
        ),
        "one": lambda: tensor.reshape(-1).index_fill(0, torch.tensor([0]), torch.nan).reshape(tensor.shape),
        "flat": lambda: tensor.reshape(-1),
        "turned": lambda: tensor.mT,
        "rows": lambda: tensor[: draw(st.integers(0, 2))],
        "deeper": lambda: tensor[(None,) * draw(st.integers(1, 9))],
        "cast": lambda: tensor.to(draw(st.sampled_from(DTYPES))),
        "alien": lambda: tensors[keys[place(draw, len(keys))]],
        "repeated": lambda: torch.cat([tensor] * 3),
        "beyond": lambda: torch.full(tensor.shape, draw(st.sampled_from([1e39, 1e300, -1e308])), dtype=torch.float64),
    }
    kinds = ["fill", "cast", "alien", "beyond"]
    kinds += ["one", "flat", "rows", "deeper", "repeated"] * (tensor.numel() > 0 < tensor.dim())
    kinds += ["turned"] * (tensor.dim() > 1)
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        kinds = ["cast", "alien"]
    tensors[key] = made[draw(st.sampled_from(kinds))]()
    size = struct.unpack("<Q", blob[:8])[0]
    said = json.loads(blob[8 : 8 + size]).get("__metadata__")
    return save({k: t.clone().contiguous() for k, t in tensors.items()}, said)


def packed(header, data):
    text = json_text(header)
    return struct.pack("<Q", len(text)) + text + data


def safetensors_mutated(draw, blob, other):
    """One to three changes, each in one of the three ways; a file too broken for the finer ones gets bytes changed."""
    for _ in range(draw(COUNT)):
        how = draw(st.sampled_from([bytes_mutated, header_mutated, header_mutated] + [tensor_mutated] * 4))
        try:
            blob = how(draw, blob, other)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, struct.error, RuntimeError):
            blob = bytes_mutated(draw, blob, other)
    return blob


# ---- JSON


def json_text(value):
    return json.dumps(value).replace(f'"{HUGE}"', "1e999").encode()


def json_mutated(draw, blob, other):
    """One to three values replaced, taken out, put in or said twice; or bytes changed."""
    value = json.loads(blob)
    for _ in range(draw(COUNT)):
        inner, key = step_down(draw, value)
        if inner is None:
            return json_text(draw(st.sampled_from(ODD)))
        kind = draw(st.sampled_from(["set", "set", "set", "delete", "add", "bytes", "twice"]))
        if kind == "set":
            inner[key] = deepcopy(draw(st.sampled_from(ODD) | st.text(max_size=20) | st.integers(-9, 9)))
        elif kind == "delete":
            del inner[key]
        elif kind == "add" and isinstance(inner, dict):
            inner[draw(st.text(max_size=9))] = deepcopy(draw(st.sampled_from(ODD)))
        elif kind == "add":
            inner.append(deepcopy(draw(st.sampled_from([*inner, *ODD]))))
        elif kind == "twice" and isinstance(value, dict) and value:
            return json_text(value)[:-1] + b", " + json_text(dict([next(iter(value.items()))]))[1:]
        else:
            return bytes_mutated(draw, json_text(value), other)
    return json_text(value)


def step_down(draw, value):
    """A list or object anywhere in a JSON value, and a key of it; None where the value holds nothing."""
    found = None, None
    while isinstance(value, dict | list) and value:
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = keys[place(draw, len(keys))]
        found, value = (value, key), value[key]
        if draw(st.integers(0, 2)) == 0:
            break
    return found
