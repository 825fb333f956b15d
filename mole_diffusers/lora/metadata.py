"""What a LoRA file's header, and the note that web interfaces keep beside it, say: kohya's keys, ModelSpec's, PEFT's.

Everything here is a stranger's word: a hint that is broken counts as absent, a PEFT config that is broken is refused,
since the scale of every layer hangs on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole_diffusers.lora.expert import COMPONENTS
from mole_diffusers.lora.keys import layer_key
from mole_diffusers.lora.safe_files import RefusedFileError, parse_json, read_json

PEFT_METADATA = "lora_adapter_metadata"  # header key under which diffusers writes the LoraConfig of each component
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ABOUT = {  # what a person wants to know -> the header keys that say it, the first one there counts
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "description": ("modelspec.description", "ss_training_comment"),
    "license": ("modelspec.license",),
    "usage": ("modelspec.usage_hint",),
    "merged from": ("modelspec.merged_from", "mole.experts"),
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "clip skip": ("modelspec.encoder_layer", "ss_clip_skip"),
    "trained on": ("ss_sd_model_name",),
    "trainer": ("modelspec.implementation", "ss_network_module"),
}
ARCHITECTURES = {  # how modelspec.architecture or ss_base_model_version begins -> family
    "stable-diffusion-xl-v1-refiner": "SDXL refiner",
    "stable-diffusion-xl": "SDXL",
    "sdxl": "SDXL",
    "stable-diffusion-v1": "SD 1.x",
    "sd_v1": "SD 1.x",
    "sd_1": "SD 1.x",
    "stable-diffusion-v2": "SD 2.x",
    "sd_v2": "SD 2.x",
    "stable-diffusion-3": "SD 3",
    "stable-diffusion-v3": "SD 3",
    "sd3": "SD 3",
    "flux": "Flux",
}


def summarize(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the header says in words for people: title, author, license, ... those that are there."""
    found = {name: next((metadata[k] for k in keys if metadata.get(k)), "") for name, keys in ABOUT.items()}
    return {name: text for name, text in found.items() if text and text != "None"}


def stated_base(metadata: Mapping[str, str]) -> str | None:
    """The model family that the header names, ModelSpec's word before kohya's."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        stated = metadata.get(key, "").lower()
        if family := next((f for start, f in ARCHITECTURES.items() if stated.startswith(start)), None):
            return family
    return {"true": "SD 2.x"}.get(metadata.get("ss_v2", "").lower())


def triggers(metadata: Mapping[str, str], note: Mapping[str, Any]) -> tuple[str, ...]:
    """Trigger words: the note's, else ModelSpec's trigger phrase, else kohya's three most frequent training tags."""
    for phrase in (note.get("activation text"), metadata.get("modelspec.trigger_phrase")):
        if isinstance(phrase, str) and phrase.strip():
            return tuple(word.strip() for word in phrase.split(",") if word.strip())
    return training_tags(metadata)[:3]


def training_tags(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """kohya's training tags, the most frequent first."""
    try:
        folders = parse_json(metadata.get("ss_tag_frequency", "{}"), "ss_tag_frequency")
    except RefusedFileError:
        return ()
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        counts.update({tag.strip(): n for tag, n in tags.items() if type(n) is int} if isinstance(tags, dict) else {})
    return tuple(tag for tag, _ in counts.most_common() if tag)


def note_beside(path: Path) -> Mapping[str, Any]:
    """STEM.json next to the file, in which A1111 keeps what its user wrote; empty where there is none."""
    try:
        note = read_json(path.with_suffix(".json"))
    except (FileNotFoundError, RefusedFileError):
        return {}
    return note if isinstance(note, dict) else {}


# ---- PEFT's config


@dataclass(frozen=True)
class Scaling:
    """alpha / r of one part's layers by its PEFT config, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023)."""

    alpha: float | None = None  # None: equal to the rank
    patterns: Mapping[str, float] | None = None  # end of a layer key -> alpha
    root: bool = False

    def __call__(self, layer: str, rank: int) -> float:
        alpha = next((self.patterns[end] for end in _ends(layer) if end in self.patterns), None) if self.patterns else None
        alpha = alpha if alpha is not None else self.alpha
        return (rank if alpha is None else alpha) / (rank**0.5 if self.root else rank)


def _ends(layer: str) -> Iterator[str]:
    """a_b_c -> a_b_c, b_c, c: a pattern is the end of a module's name, and the longest that fits is the closest."""
    while layer:
        yield layer
        layer = layer.partition("_")[2]


def scalings(metadata: Mapping[str, str], beside: Mapping[str, Any] | None = None) -> dict[str, Scaling]:
    """diffusers' header metadata {"unet.lora_alpha": ..} -> {part: Scaling}; else the config beside the file, for all parts.

    Raises ValueError where it is not what PEFT writes, or says DoRA.
    """
    if PEFT_METADATA not in metadata:
        return {} if beside is None else dict.fromkeys(COMPONENTS, _scaling(beside, PEFT_CONFIG))
    flat = parse_json(metadata[PEFT_METADATA], f"its {PEFT_METADATA}")
    if not isinstance(flat, dict):
        raise ValueError(f"its {PEFT_METADATA} is not a JSON object")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        configs.setdefault(part, {})[name] = value
    return {part: _scaling(config, PEFT_METADATA) for part, config in configs.items()}


def config_beside(path: Path) -> Mapping[str, Any] | None:
    """The config that PEFT's own `save_pretrained` writes next to adapter_model.safetensors; None beside other files."""
    if path.name != PEFT_FILE or not (config := path.with_name(PEFT_CONFIG)).is_file():
        return None
    if not isinstance(said := read_json(config), dict):
        raise ValueError(f"its {PEFT_CONFIG} is not a JSON object")
    return said


def _scaling(config: Mapping[str, Any], where: str) -> Scaling:
    if config.get("use_dora"):
        raise ValueError(f"its {where} says DoRA, whose change depends on the base's own weights")
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    given = [] if alpha is None else [alpha]
    if not isinstance(patterns, dict) or not all(_is_number(value) for value in [*given, *patterns.values()]):
        raise ValueError(f"its {where} holds an alpha that is not a finite number")
    ends = {layer_key(pattern.strip("^$")): float(value) for pattern, value in patterns.items()}
    return Scaling(None if alpha is None else float(alpha), ends, bool(config.get("use_rslora")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9 and math.isfinite(value)
