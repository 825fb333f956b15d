"""The notes that other tools write next to a LoRA file: its trigger words, and the strength it is used at.

Nobody's notes are trusted: what cannot be read, or is of another kind, counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mole_diffusers.lora.safe_files import RefusedFileError, parse_json, read_json

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


def note_paths(path: Path) -> list[Path]:
    """Where the notes of a LoRA file would be."""
    return [path.with_name(f"{path.stem}{ending}") for ending in NOTES]


def stated_beside(path: Path) -> list[Any]:
    """What the notes of a LoRA file state as its trigger words, each as it is written."""
    return [words(_read(file)) for file, words in zip(note_paths(path), NOTES.values(), strict=True)]


def preferred_weight(path: Path) -> float | None:
    """The strength at which the notes of a LoRA file say it is used; None if they do not."""
    said: list[Any] = [_read(path.with_suffix(".json")).get("preferred weight")]  # Forge, which writes 0 for none
    tips = _read(path.with_name(f"{path.stem}.metadata.json")).get("usage_tips")  # LoRA Manager's, as JSON in a text
    if isinstance(tips, str):
        try:
            tips = parse_json(tips, "usage_tips")
        except RefusedFileError:
            tips = None
    said.append(tips.get("strength") if isinstance(tips, dict) else None)
    for value in said:
        try:
            number = float(value)
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
