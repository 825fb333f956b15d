"""What a LoRA file says about itself: its header (kohya's keys, ModelSpec's, PEFT's) and the files next to it.

None of it is trusted. A broken hint counts as absent. A broken PEFT config is refused, because every layer's scale
depends on it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mole_diffusers.lora.expert import COMPONENTS
from mole_diffusers.safe_files import RefusedFileError, parse_json, read_json

PEFT_METADATA = "lora_adapter_metadata"  # header key under which diffusers writes the LoraConfig of each component
MOST_TRIGGERS = 64  # in a trigger phrase, each at most 200 characters: every prompt is searched for all of them
TAG = re.compile(r"<\w+:[^<>]*>")  # such as <lora:fox:0.8>, which is no word of the prompt
# What A1111 does not read as words: brackets and the weights in them, and a backslash before a bracket that is a word's.
MARK = re.compile(r"\\([()\[\]\\])|:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*(?=\))|[()\[\]]")
MODULE = re.compile(r"\^?[\w.-]+")  # patterns for names may only be this; regular expressions from a file are never run
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SUMMARY = {  # field of a summary -> the header keys it is taken from; the first one present counts
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


def summarize(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header fields that people read: title, author, license, ...; only those that are present."""
    found = {name: next((metadata[k] for k in keys if metadata.get(k)), "") for name, keys in SUMMARY.items()}
    return {name: text for name, text in found.items() if text and text != "None"}


def as_read(phrases: Sequence[str]) -> tuple[str, ...]:
    """Phrases as they are written, and then as a prompt with weights is read: "(miku:1.2)" is "miku" there."""
    read = map(plain, phrases)
    return tuple(dict.fromkeys((*phrases, *(phrase for phrase in read if re.search(r"\w", phrase)))))


def plain(phrase: str) -> str:
    """A phrase without A1111's brackets and weights."""
    return MARK.sub(lambda mark: mark[1] or "", phrase).strip()


def training_tags(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """kohya's training tags, the most frequent first."""
    return tuple(tag_counts(metadata)[0])


def tag_counts(metadata: Mapping[str, str]) -> tuple[dict[str, int], int]:
    """kohya's training tags, the most frequent first -> how many captions have them; and how many captions there are.

    Where a header does not tell a folder's pictures, its most frequent tag counts as being in each caption. Folders of
    regularisation are left out.
    """
    folders, pictures, others = (
        _object(metadata.get(key, "{}")) for key in ("ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs")
    )
    counts: Counter[str] = Counter()
    captions = 0
    for folder, tags in folders.items():
        if not isinstance(tags, dict) or (folder in others and folder not in pictures):
            continue
        own: Counter[str] = Counter()
        for tag, count in tags.items():
            if type(count) is int and count > 0 and tag.strip():
                own[tag.strip()[:200]] += count
        told = pictures[folder].get("img_count") if isinstance(pictures.get(folder), dict) else None
        captions += max([told if type(told) is int else 0, *own.values()])
        counts.update(own)
    return dict(counts.most_common()), captions


def _object(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty if there is none."""
    try:
        found = parse_json(text, "it")
    except RefusedFileError:
        return {}
    return found if isinstance(found, dict) else {}


# ---- PEFT's config


Patterns = Mapping[str, tuple[int, float]]  # end of a module's name, or the whole after "^" -> place in the config, number


@dataclass(frozen=True)
class Scaling:
    """alpha / r of one component's layers by its PEFT config, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023)."""

    alpha: float | None = None  # None: equal to the rank
    patterns: Patterns = field(default_factory=dict)  # alphas of some layers; of those that fit, the first counts
    root: bool = False  # divide by sqrt(r), as rsLoRA does
    rank: float | None = None  # where matrices do not tell it, as LoKr's with two whole ones; None: the scale is 1
    ranks: Patterns = field(default_factory=dict)
    dora: bool = False

    def __call__(self, module: str, told: int | None) -> float:
        """The scale of a layer whose matrices tell this rank."""
        rank = _named(self.ranks, module, self.rank) if told is None else told
        if rank is None:
            return 1.0
        alpha = _named(self.patterns, module, self.alpha)
        return (rank if alpha is None else alpha) / (rank**0.5 if self.root else rank)


def _named(patterns: Patterns, module: str, default: float | None) -> float | None:
    """The number of the first pattern that fits a module's name."""
    parts = module.split(".")
    fitting = (f"^{module}", *(".".join(parts[i:]) for i in range(len(parts))))
    return min((patterns[name] for name in fitting if name in patterns), default=(0, default))[1]


def scalings(metadata: Mapping[str, str], config: Mapping[str, Any] | None = None) -> dict[str, Scaling]:
    """{component: Scaling} from diffusers' header metadata {"unet.lora_alpha": ..}, else from the `config` next to the file.

    Raises ValueError if it is not in PEFT's format.
    """
    if PEFT_METADATA not in metadata:
        return {} if config is None else dict.fromkeys(COMPONENTS, _scaling(config, PEFT_CONFIG))
    flat = parse_json(metadata[PEFT_METADATA], f"its {PEFT_METADATA}")
    if not isinstance(flat, dict):
        raise ValueError(f"its {PEFT_METADATA} is not a JSON object")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    return {component: _scaling(config, PEFT_METADATA) for component, config in configs.items()}


def read_peft_config(path: Path) -> Mapping[str, Any] | None:
    """The config that PEFT's own `save_pretrained` writes next to adapter_model.safetensors; None next to other files."""
    if path.name != PEFT_FILE or not (file := path.with_name(PEFT_CONFIG)).is_file():
        return None
    if not isinstance(config := read_json(file), dict):
        raise ValueError(f"its {PEFT_CONFIG} is not a JSON object")
    return config


def _scaling(config: Mapping[str, Any], where: str) -> Scaling:
    # PEFT calls the alpha of LoRA lora_alpha, and that of LoHa and LoKr alpha
    alpha, named = _numbers(config.get("lora_alpha", config.get("alpha")), config.get("alpha_pattern"), "an alpha", where)
    root = bool(config.get("use_rslora"))
    if config.get("peft_type") != "LOKR":
        return Scaling(alpha, named, root, dora=bool(config.get("use_dora")))
    rank, ranks = _numbers(config.get("r"), config.get("rank_pattern"), "a rank", where)
    if any(number < 1 for _, number in ranks.values()) or (rank is not None and rank < 1):
        raise ValueError(f"its {where} holds a rank below 1")
    return Scaling(alpha, named, root, rank, ranks)


def _numbers(general: Any, by_name: Any, what: str, where: str) -> tuple[float | None, dict[str, tuple[int, float]]]:
    """A number of PEFT's config for all layers, and those by the names of modules. ValueError if they are anything else."""
    patterns = by_name or {}
    if not isinstance(patterns, dict) or not all(map(_is_number, [*patterns.values(), 0 if general is None else general])):
        raise ValueError(f"its {where} holds {what} that is not a finite number")
    named = {
        pattern.replace(r"\.", ".").removesuffix("$"): (place, float(value))
        for place, (pattern, value) in enumerate(patterns.items())
    }
    if unknown := [name for name in named if not MODULE.fullmatch(name)]:
        raise ValueError(f"its {where} has {what} for {unknown[0]!r}, which is not the name of a module, nor its end")
    return None if general is None else float(general), named


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9 and math.isfinite(value)


# ---- the notes that other tools write next to a file: its trigger words, and the strength it is used at


Note = Mapping[str, Any]


def _inside(note: Note, name: str) -> Note:
    found = note.get(name)
    return found if isinstance(found, dict) else {}


def _of_civitai(words: Any) -> list[Any]:
    """rgthree's words that come from the model's page. It also lists training tags, with their counts."""
    entries = [each for each in words if isinstance(each, dict)] if isinstance(words, list) else []
    return [each.get("word") for each in entries if each.get("civitai") or each.get("user")]


# What follows the LoRA's name without its suffix -> its trigger words: a text, or a list of texts. The user's own first.
NOTES: dict[str, Callable[[Note], Any]] = {
    ".json": lambda note: note.get("activation text"),  # A1111, Forge
    ".swarm.json": lambda note: note.get("modelspec.trigger_phrase"),  # SwarmUI
    ".metadata.json": lambda note: _inside(note, "civitai").get("trainedWords"),  # ComfyUI's LoRA Manager
    ".safetensors.rgthree-info.json": lambda note: _of_civitai(note.get("trainedWords")),  # ComfyUI's rgthree
    ".civitai.info": lambda note: note.get("trainedWords"),  # Civitai Helper
    ".cm-info.json": lambda note: note.get("TrainedWords"),  # Stability Matrix
}


def stated_beside(path: Path) -> list[Any]:
    """What the notes of a LoRA file state as its trigger words, each as it is written."""
    return [words(_read(path.with_name(f"{path.stem}{ending}"))) for ending, words in NOTES.items()]


def preferred_weight(path: Path) -> float | None:
    """The strength at which the notes of a LoRA file say it is used; None if they do not."""
    of_forge, of_manager = _read(path.with_suffix(".json")), _read(path.with_name(f"{path.stem}.metadata.json"))
    tips = of_manager.get("usage_tips")  # JSON in a text
    tips = _object(tips) if isinstance(tips, str) else _inside(of_manager, "usage_tips")
    said: Any
    for said in (of_forge.get("preferred weight"), tips.get("strength")):  # Forge writes 0 for none
        try:
            number = float(said)
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(number) and 0 < abs(number) <= 10:
            return number
    return None


def _read(file: Path) -> Note:
    try:
        note = read_json(file)
    except (FileNotFoundError, RefusedFileError):
        return {}
    return note if isinstance(note, dict) else {}
