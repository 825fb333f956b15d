"""The protocol for real checkpoints: CLIP-T, CLIP-I and DINO of every concept against pictures of that concept.

CLIP scores do not follow human judgement of composition (ComposLoRA reports r = -0.006). `judging_sheet` is for that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from mole_diffusers.evaluation.report import EvaluationReport
from mole_diffusers.evaluation.rows import Row, digest
from mole_diffusers.evaluation.runner import Case
from mole_diffusers.evaluation.tables import as_frame, by_kind, concept_mean
from mole_diffusers.lora.safe_files import json_lines
from mole_diffusers.options import check_options
from mole_diffusers.training.clip import read_clip
from mole_diffusers.training.data import read_folder

SCORES = ("CLIP-T", "CLIP-I", "DINO")
DINO_BY_ROLE = ("DINO of subjects", "DINO of styles")


def read_cases(path: Path, known: Sequence[str]) -> list[Case]:
    """Cases from JSON lines: {"concepts": ["dog", "hat"], "prompt": "a dog wearing a hat"}.

    A line may also have "kind", a name for this sort of case, and "size", width and height in pixels.

    Raises ValueError naming a line that is not a case, or a concept without an expert.
    """
    cases = []
    for where, found in json_lines(path):
        try:
            case = _case(found)
        except (ValueError, KeyError) as error:
            raise ValueError(f'{where}: not {{"concepts": [..], "prompt": ".."}}: {error}') from error
        if unknown := set(case.concepts) - set(known):
            raise ValueError(f"{where}: no expert for {sorted(unknown)}; known: {sorted(known)}")
        cases.append(case)
    if not cases:
        raise ValueError(f"{path} holds no cases")
    return cases


def _case(found: object) -> Case:
    if not isinstance(found, dict):
        raise ValueError(f"got {found!r}")
    check_options(found, {"concepts": list[str], "prompt": str, "kind": str, "size": list[int] | None}, "a case")
    concepts, size = found["concepts"], found.get("size")
    if not concepts or len(set(concepts)) < len(concepts):
        raise ValueError(f"concepts are different names, one or more, got {concepts!r}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f'"size" is [width, height] in pixels, got {size!r}')
    kind = found.get("kind", f"{len(concepts)} concepts")
    return Case(tuple(concepts), kind, found["prompt"], size=(size[0], size[1]) if size else None)


def windows(image: Image.Image) -> list[Image.Image]:
    """The whole picture and nine crops of half its side. A concept is scored in the one that fits it best.

    All are squares, because the models' processors cut off what is beside a square. Other pictures get grey bars.
    """
    side = max(image.size)
    square = image if image.size == (side, side) else ImageOps.pad(image, (side, side), color="grey")
    corners = [(x * side // 4, y * side // 4) for y in range(3) for x in range(3)]
    return [square, *(square.crop((x, y, x + side // 2, y + side // 2)) for x, y in corners)]


class ClipDinoMetrics:
    """Measures `clip_t`, `clip_i` and `dino`.

    `clip_t` is the cosine of picture and prompt. `clip_i` and `dino` map each concept to the best window's mean cosine
    with the concept's own pictures.

    Args:
        clip: a CLIP model, folder or hub name.
        dino: a DINO model, folder or hub name.
        folders: concept -> a folder of its pictures.
    """

    def __init__(self, clip: str, dino: str, folders: Mapping[str, Path], *, device: str = "cpu"):
        from transformers import AutoImageProcessor, AutoModel

        self.clip = read_clip(clip, device=device)
        self.clip_pixels = AutoImageProcessor.from_pretrained(clip)
        self.dino = AutoModel.from_pretrained(dino).eval().to(device)
        self.dino_pixels = AutoImageProcessor.from_pretrained(dino)
        pictures = {name: read_folder(folder, prompt=name)[0] for name, folder in folders.items()}
        own = digest(part for name, images in pictures.items() for part in (name.encode(), *(i.tobytes() for i in images)))
        self.settings = {"clip": clip, "dino": dino, "own_pictures": own}  # what the scores depend on, for the rows
        self.own_clip = {name: self._clip(images) for name, images in pictures.items()}  # [P, D]
        self.own_dino = {name: self._dino(images) for name, images in pictures.items()}

    def __call__(self, case: Case, images: Sequence[Image.Image]) -> list[Row]:
        text = self.clip.text([case.prompt])[0]  # [D]
        rows: list[Row] = []

        def likeness(crops: torch.Tensor, own: Mapping[str, torch.Tensor]) -> dict[str, float]:
            return {c: (crops @ own[c].T).mean(1).max().item() for c in case.concepts if c in own}

        for image in images:
            crops = windows(image)
            clip, dino = self._clip(crops), self._dino(crops)  # [10, D]
            found = {"clip_i": likeness(clip, self.own_clip), "dino": likeness(dino, self.own_dino)}
            rows.append({"clip_t": (clip[0] @ text).item(), **found})
        return rows

    @torch.no_grad()
    def _clip(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self.clip.features(self.clip_pixels(list(images), return_tensors="pt").pixel_values)  # [B, D]

    @torch.no_grad()
    def _dino(self, images: Sequence[Image.Image]) -> torch.Tensor:
        x = self.dino_pixels(list(images), return_tensors="pt").pixel_values.to(self.dino.device)
        return F.normalize(self.dino(pixel_values=x).last_hidden_state[:, 0], dim=-1)  # [B, D], the class token


def frame(rows: Sequence[Row], styles: Collection[str] = ()) -> pd.DataFrame:
    """Rows as a table with `SCORES` as means over a case's concepts, and DINO for its subjects and for its styles.

    A score is NaN if none of the concepts has pictures.
    """
    found = as_frame(rows)
    found["CLIP-T"], found["CLIP-I"] = found["clip_t"], concept_mean(found["clip_i"])
    found["DINO"] = concept_mean(found["dino"])
    found["DINO of subjects"] = concept_mean(found["dino"], lambda concept: concept not in styles)
    found["DINO of styles"] = concept_mean(found["dino"], lambda concept: concept in styles)
    return found


def report(styles: Collection[str]) -> EvaluationReport:
    """The report, with scores instead of success, which nothing can judge here."""
    return EvaluationReport(
        frame=partial(frame, styles=styles),
        tables=(partial(by_kind, scores=SCORES),),
        values=SCORES,
        roles=DINO_BY_ROLE,
        limits=(None, None),
        styles=styles,
    )
