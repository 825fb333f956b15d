"""`emoji_world()` loads the embedded world as one object: base pipeline, LoRAs, gates, judge, drawings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mole_world.drawings import Drawings, default_folder
from mole_world.judge import Judge


@dataclass(frozen=True)
class EmojiWorld:
    """A small but real Stable Diffusion with a ground truth for composition. `canvas` gives the sizes of its pictures.

    Attributes:
        pipe: the base, a StableDiffusionPipeline. It knows `words.BASE_SUBJECTS` in `words.BASE_STYLES`.
        loras: concept -> LoRA file, for every held-out subject and style.
        gates: composition, such as "fox+relief" -> folder of gates trained for these experts.
        drawings: the artists' drawings.
        folder: the world's files.
    """

    pipe: Any
    loras: dict[str, Path]
    gates: dict[str, Path]
    drawings: Drawings
    folder: Path

    def judge(self) -> Judge:
        """The evaluator. Nothing in this world was trained with it."""
        return Judge.load(self.folder / "judge")


def concept_files() -> dict[str, Path]:
    """The world's LoRA files by concept."""
    return {p.stem.replace("_", " "): p for p in sorted((default_folder() / "loras").glob("*.safetensors"))}


def gate_folders() -> dict[str, Path]:
    """The world's trained gates by composition, such as "fox+relief"."""
    return {p.name.replace("_", " "): p for p in sorted((default_folder() / "gates").glob("*")) if p.is_dir()}


def emoji_world(*, device: str = "cpu", dtype: torch.dtype = torch.float32) -> EmojiWorld:
    """Load the embedded world from a checkout or an installed package. Nothing is downloaded."""
    from diffusers import StableDiffusionPipeline

    folder = default_folder()
    pipe = StableDiffusionPipeline.from_pretrained(folder / "base", dtype=dtype, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    return EmojiWorld(pipe, concept_files(), gate_folders(), Drawings(folder), folder)
