"""LoRA files -> Expert: diffusers, PEFT and kohya/A1111 keys, alpha/r read per layer from the raw file."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
PEFT_METADATA = "lora_adapter_metadata"  # header key under which diffusers writes the LoraConfig of each component
KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
OWN_NAMES = {
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding."),
    "text_encoder": ("text_model.", "encoder.layers."),
}
UNSUPPORTED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "diff": "a full weight difference",
}
ROLE = re.compile(
    r"[._](?:(?P<a>lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down)|"
    r"(?P<b>lora_B(?:\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up))\.weight$"
)
BASE_BY_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


@dataclass(frozen=True)
class LoraWeights:
    """One layer of one LoRA: delta W = scale * up @ down."""

    down: torch.Tensor  # [r, Cin] or [r, Cin, k, k]
    up: torch.Tensor  # [Cout, r] or [Cout, r, 1, 1]
    scale: float  # alpha / r of this layer

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """The full change of the layer's weight, fp32: [Cout, Cin] or [Cout, Cin, k, k]."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Expert:
    """One concept LoRA: every layer of its file, and what the file says of itself.

    `layers` maps a part ("unet", "text_encoder", ...) to {layer key: LoraWeights}. A layer key is the host module's
    name with dots as underscores, the one form that diffusers, PEFT and kohya files share.
    """

    name: str
    layers: dict[str, dict[str, LoraWeights]]
    format: str  # "diffusers", "peft" or "kohya"
    base: str  # "SD 1.x", "SD 2.x", "SDXL" or "cross-attention WIDTH"
    triggers: tuple[str, ...]
    source: str  # the file
    sha256: str  # of the tensor bytes after the header, so that edited metadata does not change it
    metadata: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank over all layers."""
        ranks = [w.rank for part in self.layers.values() for w in part.values()]
        return min(ranks), max(ranks)


def read_expert(path: str | Path, name: str | None = None) -> Expert:
    """Read one LoRA file. Safetensors only; the content decides, not the suffix.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors, no LoRA keys, an unsupported algorithm, a missing or mismatched pair, a value that
            is not finite. The message names the file and the layer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file at {path}")
    tensors, metadata = _read(path)
    layers, form = _pair(tensors, metadata, path)
    return Expert(
        name=name or path.stem,
        layers=layers,
        format=form,
        base=_base(layers),
        triggers=_triggers(metadata),
        source=str(path),
        sha256=_tensor_hash(path),
        metadata=metadata,
    )


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a safetensors file, the only kind that is read: {error}") from error


def _tensor_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _pair(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path
) -> tuple[dict[str, dict[str, LoraWeights]], str]:
    """Tensors -> {part: {layer key: LoraWeights}} and the format's name."""
    halves: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    alphas: dict[tuple[str, str], float] = {}
    forms: Counter[str] = Counter()
    for key, tensor in tensors.items():
        if algorithm := next((UNSUPPORTED[w] for w in key.split(".")[1:] if w in UNSUPPORTED), None):
            raise ValueError(f"{path}: layer {key!r} is {algorithm}; only plain LoRA is read")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key!r} holds values that are not finite")
        if key.endswith(".alpha"):
            alphas[_layer(key.removesuffix(".alpha"), path)] = float(tensor)
        elif role := ROLE.search(key):
            half = "down" if role["a"] else "up"
            halves.setdefault(_layer(key[: role.start()], path), {})[half] = tensor
            forms[_format(key, role)] += 1
        else:
            raise ValueError(f"{path}: {key!r} is not a LoRA key")
    if not halves:
        raise ValueError(f"{path} holds no LoRA layers")
    scale = _Scales(alphas, _peft_configs(metadata, path))
    layers: dict[str, dict[str, LoraWeights]] = {}
    for (part, layer), pair in halves.items():
        weights = _checked(pair, f"{path}: layer {layer!r}")
        layers.setdefault(part, {})[layer] = LoraWeights(*weights, scale(part, layer, weights[0].shape[0]))
    return layers, forms.most_common(1)[0][0]


def _format(key: str, role: re.Match[str]) -> str:
    if key.startswith(tuple(KOHYA_PREFIXES)):
        return "kohya"
    return "peft" if "lora_A" in role[0] or "lora_B" in role[0] else "diffusers"


def _layer(stem: str, path: Path) -> tuple[str, str]:
    """A key without its role -> (part, layer key)."""
    for prefix, part in KOHYA_PREFIXES.items():
        if stem.startswith(prefix):
            return part, _canonical(stem.removeprefix(prefix).replace(".", "_"))
    stem = stem.removeprefix("base_model.model.")
    part, _, layer = stem.partition(".")
    if part not in PARTS:  # written by one model's own save: the layer's name tells which
        part, layer = next((p for p, names in OWN_NAMES.items() if stem.startswith(names)), ""), stem
    if not part:
        raise ValueError(f"{path}: {stem!r} begins with none of {[f'{p}.' for p in PARTS]} or {list(KOHYA_PREFIXES)}")
    if ".processor." in layer:  # old diffusers files name the attention processor, and to_out_lora for to_out.0
        layer = re.sub(r"\.to_out$", ".to_out.0", layer.replace(".processor.", "."))
    return part, _canonical(layer.replace(".", "_"))


def _canonical(layer: str) -> str:
    # CLIPTextModel lost its `text_model` level in transformers 5.6; files exist in both forms.
    return layer.removeprefix("text_model_")


def layer_key(module_name: str) -> str:
    """The layer key of a host module's dotted name."""
    return _canonical(module_name.replace(".", "_"))


def _checked(pair: Mapping[str, torch.Tensor], where: str) -> tuple[torch.Tensor, torch.Tensor]:
    if missing := {"down", "up"} - set(pair):
        raise ValueError(f"{where} has no {missing.pop()} matrix")
    down, up = pair["down"], pair["up"]
    if down.dim() not in (2, 4) or up.dim() != down.dim() or up.shape[1] != down.shape[0]:
        raise ValueError(f"{where}: down {list(down.shape)} and up {list(up.shape)} are not a low-rank pair")
    if up.dim() == 4 and up.shape[2:] != (1, 1):
        raise ValueError(f"{where}: the up matrix {list(up.shape)} of a convolution must be 1 x 1")
    return down, up


@dataclass(frozen=True)
class _Scales:
    """alpha / r of a layer: its own alpha first, then the PEFT config of its part, else 1."""

    alphas: Mapping[tuple[str, str], float]
    configs: Mapping[str, Mapping]

    def __call__(self, part: str, layer: str, rank: int) -> float:
        if (part, layer) in self.alphas:
            return self.alphas[part, layer] / rank
        config = self.configs.get(part)
        if config is None:
            return 1.0
        alpha = next(
            (
                value
                for pattern, value in config.get("alpha_pattern", {}).items()
                if re.search(rf"(^|_){re.escape(layer_key(pattern.strip('^$')))}$", layer)
            ),
            config.get("lora_alpha", rank),
        )
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _peft_configs(metadata: Mapping[str, str], path: Path) -> dict[str, dict]:
    """diffusers' header metadata: {"unet.lora_alpha": ..} -> {part: config}."""
    if PEFT_METADATA not in metadata:
        return {}
    try:
        flat = json.loads(metadata[PEFT_METADATA])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its {PEFT_METADATA} is not JSON: {error}") from error
    configs: dict[str, dict] = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        configs.setdefault(part, {})[name] = value
    return configs


def _base(layers: Mapping[str, Mapping[str, LoraWeights]]) -> str:
    """The base family, from the width of the text states that cross-attention reads."""
    if "transformer" in layers:
        return "transformer"
    for layer, weights in layers.get("unet", {}).items():
        if layer.endswith(("attn2_to_k", "attn2_to_v")):
            width = weights.down.shape[1]
            return BASE_BY_WIDTH.get(width, f"cross-attention {width}")
    return "unknown"


def _triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Trigger words: ModelSpec's trigger phrase, else kohya's three most frequent training tags."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return tuple(word.strip() for word in phrase.split(",") if word.strip())
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag.strip(): int(n) for tag, n in tags.items()})
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError):
        return ()  # a hint only: a file with broken statistics is still a good LoRA
    return tuple(tag for tag, _ in counts.most_common(3))
