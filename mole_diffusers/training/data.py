"""Training data: prompts, pictures with captions as latents, and the random batch of one update."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from PIL import Image, ImageOps

from mole_diffusers.options import check_kinds, check_names
from mole_diffusers.safe_files import json_lines, read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Samples:
    """Training pictures with captions, encoded once.

    Attributes:
        latents: [S, C, H, W], scaled as the UNet expects them, on the CPU.
        captions: S.
        source: tells what the latents were made from. By default the latents tell, to the last bit, which may differ if
            they are made again on another machine.
    """

    latents: torch.Tensor
    captions: list[str]
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.captions):
            raise ValueError(f"{len(self.latents)} latents but {len(self.captions)} captions")

    @property
    def identity(self) -> dict[str, Any]:
        """Tells these pictures from others, ready for JSON."""
        source = self.source or hashlib.sha256(self.latents.float().numpy().tobytes()).hexdigest()
        return {"source": source, "captions": self.captions}


@dataclass
class TrainingData:
    """The data that gates are trained on: prompts, and pictures if there are any.

    Attributes:
        singles: expert -> prompts that name it and no other expert.
        composed: prompts that name all experts.
        others: expert -> words that can replace its trigger ("fox": ["bear", "lemon"]), for captions that lack its concept.
        plain: prompts that name no expert.
        styles: experts that act on the whole picture, without a mask.
        parts: composed prompt -> a prompt for each of its subjects alone, left to right.
        sizes: prompt -> width and height, for pictures of single and plain prompts that do not have the model's own size.
        samples: pictures with captions.
    """

    singles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    composed: Sequence[str] = ()
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)
    plain: Sequence[str] = ()
    styles: Sequence[str] = ()
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    samples: Samples | None = None

    def __post_init__(self) -> None:
        check_kinds(vars(self), get_type_hints(TrainingData), "the training data")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingData:
        """Everything except the pictures. Raises ValueError for an unknown name, or a value of the wrong kind."""
        check_names(values, [f.name for f in fields(cls) if f.name != "samples"], "the training data")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Identifies the training data of a run, ready for JSON."""
        prompts = {name: value for name, value in vars(self).items() if name != "samples"}
        return prompts | {"pictures": self.samples.identity if self.samples else None}


def read_folder(
    folder: str | Path, *, prompt: str | None = None, side: int | None = None
) -> tuple[list[Image.Image], list[str]]:
    """Read the pictures of a folder with their captions.

    A caption comes from metadata.jsonl ({"file_name", "text"}), else from a .txt file of the same stem, else it is `prompt`.

    Args:
        side: cut each picture to a `square` of this side as it is read; the whole pictures may not fit into memory.

    Raises:
        ValueError: no pictures, a broken picture, or one without a caption; the message names the file.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"no pictures in {folder}; looked for {', '.join(SUFFIXES)}")
    texts = _captions(folder / "metadata.jsonl")
    pictures = (read_picture(p, str(p)).convert("RGB") for p in paths)
    images = [picture if side is None else square(picture, side) for picture in pictures]
    return images, [_caption(p, texts, prompt) for p in paths]


def _captions(table: Path) -> dict[str, str]:
    """File name -> caption, from lines of {"file_name", "text"}."""
    texts: dict[str, str] = {}
    for where, row in json_lines(table) if table.exists() else ():
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
            raise ValueError(f"{where}, is not {{'file_name': ..., 'text': ...}} with two texts")
        texts[row["file_name"]] = row["text"]
    return texts


def _caption(path: Path, texts: dict[str, str], prompt: str | None) -> str:
    sidecar = path.with_suffix(".txt")
    try:
        text = texts.get(path.name) or (sidecar.read_text("utf-8").strip() if sidecar.exists() else prompt)
    except UnicodeDecodeError:
        raise ValueError(f"{sidecar} is not a text in UTF-8") from None
    if not text:
        raise ValueError(f"{path} has no caption: give {sidecar.name}, metadata.jsonl or a prompt")
    return text


def square(image: Image.Image, side: int) -> Image.Image:
    """The centre crop of a picture, resized to [side, side] pixels. Raises ValueError for a side below 8."""
    if side < 8:
        raise ValueError(f"the side of pictures must be 8 pixels or more, got {side}")
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """[P, T] token ids on the CPU, padded to the tokenizer's length."""
    padded = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return padded.input_ids


@dataclass(frozen=True)
class RandomBatch:
    """The random choices of one update, of which this process and accumulated part takes its share of the rows.

    Every share draws the numbers of the whole batch and takes every `count`-th row from `index` on. Together, the shares
    do what one process would do alone.

    Attributes:
        generator: of the update, on the CPU.
        rows: of the whole batch.
        index, count: which share, of how many.
    """

    generator: torch.Generator
    rows: int
    index: int = 0
    count: int = 1

    @property
    def own_rows(self) -> int:
        """The number of rows of the share."""
        return len(range(self.index, self.rows, self.count))

    def choice(self, among: int) -> list[int]:
        """One of 0 .. among - 1 for each row of the share."""
        return self._share(torch.randint(0, among, (self.rows,), generator=self.generator)).tolist()

    def uniform(self, *shape: int) -> torch.Tensor:
        """[rows of the share, *shape] in 0..1."""
        return self._share(torch.rand(self.rows, *shape, generator=self.generator))

    def normal(self, *shape: int) -> torch.Tensor:
        """[rows of the share, *shape], standard normal."""
        return self._share(torch.randn(self.rows, *shape, generator=self.generator))

    def _share(self, drawn: torch.Tensor) -> torch.Tensor:
        return drawn[self.index :: self.count]
