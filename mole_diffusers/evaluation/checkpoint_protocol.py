"""The protocol for real checkpoints: CLIP-T, CLIP-I and DINO of every concept against its own pictures.

CLIP scores do not follow human judgement of composition (ComposLoRA reports r = -0.006), so they stand beside a sheet on
which people, or a model that sees, choose between two arms in both orders.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from mole_diffusers.evaluation.digests import digest
from mole_diffusers.evaluation.rows import PLACE, Row, place
from mole_diffusers.evaluation.runner import Case, keep, picture_path
from mole_diffusers.evaluation.tables import markdown
from mole_diffusers.inspection.figures import grid
from mole_diffusers.training.data import read_folder


def read_cases(path: Path, known: Sequence[str]) -> list[Case]:
    """Cases from JSON lines: {"concepts": ["dog", "hat"], "prompt": "a dog wearing a hat", "kind": "pair"}.

    Raises ValueError naming the line that is not one, or a concept without an expert.
    """
    cases = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            case = Case(tuple(row["concepts"]), str(row.get("kind", f"{len(row['concepts'])} concepts")), row["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: not {{"concepts": [..], "prompt": ".."}}: {error}') from error
        if unknown := set(case.concepts) - set(known):
            raise ValueError(f"{path}, line {number}: no expert for {sorted(unknown)}; known: {sorted(known)}")
        cases.append(case)
    if not cases:
        raise ValueError(f"{path} holds no cases")
    return cases


def windows(image: Image.Image) -> list[Image.Image]:
    """The whole picture and nine crops of half its side: a concept is where it fits best."""
    w, h = image.size
    corners = [(x * w // 4, y * h // 4) for y in range(3) for x in range(3)]
    return [image, *(image.crop((x, y, x + w // 2, y + h // 2)) for x, y in corners)]


class Look:
    """Measures: `clip_t` (cosine of picture and prompt), `clip_i` and `dino` (concept -> the best window's mean cosine with
    the concept's own pictures)."""

    def __init__(self, clip: str, dino: str, folders: Mapping[str, Path], *, device: str = "cpu"):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

        self.device = device
        self.clip, self.tokenizer = CLIPModel.from_pretrained(clip).eval().to(device), AutoTokenizer.from_pretrained(clip)
        self.clip_pixels = AutoImageProcessor.from_pretrained(clip)
        self.dino, self.dino_pixels = (
            AutoModel.from_pretrained(dino).eval().to(device),
            AutoImageProcessor.from_pretrained(dino),
        )
        pictures = {name: read_folder(folder, prompt=name)[0] for name, folder in folders.items()}
        own = digest(part for name, images in pictures.items() for part in (name.encode(), *(i.tobytes() for i in images)))
        self.said = {"clip": clip, "dino": dino, "own_pictures": own}  # what the scores depend on, for the rows
        self.own_clip = {name: self._clip(images) for name, images in pictures.items()}  # [P, D]
        self.own_dino = {name: self._dino(images) for name, images in pictures.items()}

    def __call__(self, case: Case, images: Sequence[Image.Image]) -> list[Row]:
        text = self._text(case.prompt)
        rows: list[Row] = []
        for image in images:
            crops = windows(image)
            clip, dino = self._clip(crops), self._dino(crops)  # [10, D]
            there = [c for c in case.concepts if c in self.own_clip]
            rows.append(
                {
                    "clip_t": (clip[0] @ text).item(),
                    "clip_i": {c: (clip @ self.own_clip[c].T).mean(1).max().item() for c in there},
                    "dino": {c: (dino @ self.own_dino[c].T).mean(1).max().item() for c in there},
                }
            )
        return rows

    @torch.no_grad()
    def _text(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer([prompt], padding=True, truncation=True, return_tensors="pt").to(self.device)
        pooled = self.clip.text_model(**ids).pooler_output
        return F.normalize(self.clip.text_projection(pooled)[0], dim=-1)  # [D]

    @torch.no_grad()
    def _clip(self, images: Sequence[Image.Image]) -> torch.Tensor:
        x = self.clip_pixels(list(images), return_tensors="pt").pixel_values.to(self.device)
        pooled = self.clip.vision_model(pixel_values=x).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)  # [B, D]

    @torch.no_grad()
    def _dino(self, images: Sequence[Image.Image]) -> torch.Tensor:
        x = self.dino_pixels(list(images), return_tensors="pt").pixel_values.to(self.device)
        return F.normalize(self.dino(pixel_values=x).last_hidden_state[:, 0], dim=-1)  # [B, D], the class token


def judging_sheet(folder: Path, rows: Sequence[Row]) -> int:
    """Pairs of arms on the same case and seed, each in both orders: sheet/NNNN.png, answers.csv to fill in, key.json.

    Returns the number of questions. The arms' names are in key.json alone, so that the sheet can be given away blind.

    Raises ValueError for rows of one arm, or where a sheet with answers lies.
    """
    if (folder / "sheet" / "answers.csv").exists() and any(_given(folder)):
        raise ValueError(f"{folder / 'sheet'} holds answers: count them with --judged, or move it before a new one is made")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(place(row), []).append(row)
    if all(len(group) < 2 for group in groups.values()):
        raise ValueError("a sheet needs two arms or more")
    pairs = [pair for group in groups.values() for a, b in combinations(group, 2) for pair in ((a, b), (b, a))]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled: list[dict[str, Any]] = []
    for number, (left, right) in enumerate(pairs[i] for i in order):
        pictures = [Image.open(picture_path(folder, row)).convert("RGB") for row in (left, right)]
        keep(grid([pictures], ["left", "right"], [""], cell=256), folder / "sheet" / f"{number:04}.png")
        shuffled.append({name: left[name] for name in PLACE} | {"left": left["arm"], "right": right["arm"]})
    with (folder / "sheet" / "answers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "prompt", "better: left, right or same"])
        writer.writerows([f"{n:04}", q["prompt"], ""] for n, q in enumerate(shuffled))
    (folder / "sheet" / "key.json").write_text(json.dumps(shuffled, indent=1) + "\n")
    return len(shuffled)


ANSWERS = ("left", "right", "same")


def judged(folder: Path) -> str:
    """The answers on a filled-in sheet as a table: per pair of arms how often each was better, and how often the two orders
    of one pair of pictures agree; "-" where no pair was answered in both.

    Raises ValueError for an answer that is none.
    """
    key = json.loads((folder / "sheet" / "key.json").read_text())
    given = _given(folder)
    found: dict[tuple[str, str], list[tuple[tuple, str]]] = {}  # (arm, arm) -> (which picture, better arm or "same")
    for number, (question, answer) in enumerate(zip(key, given, strict=True)):
        if answer not in (*ANSWERS, ""):
            raise ValueError(f"answers.csv, question {number:04}: {answer!r} is none of {list(ANSWERS)}")
        if answer:
            first, second = sorted((question["left"], question["right"]))
            better = question.get(answer, "same")
            found.setdefault((first, second), []).append((place(question), better))
    body = [[first, second, *_counted(first, second, votes)] for (first, second), votes in found.items()]
    return markdown(["first arm", "second arm", "first better", "second better", "same", "orders agree"], body)


def _given(folder: Path) -> list[str]:
    """The answers on a sheet, "" for questions without one."""
    with (folder / "sheet" / "answers.csv").open(newline="") as file:
        return [line[2].strip().lower() for line in list(csv.reader(file))[1:]]


def _counted(first: str, second: str, votes: Sequence[tuple[tuple, str]]) -> list[str]:
    chosen = [better for _, better in votes]
    pairs: dict[tuple, list[str]] = {}
    for pictures, better in votes:
        pairs.setdefault(pictures, []).append(better)
    both = [len(set(pair)) == 1 for pair in pairs.values() if len(pair) == 2]
    agree = f"{sum(both) / len(both):.2f}" if both else "-"
    return [str(chosen.count(arm)) for arm in (first, second, "same")] + [agree]
