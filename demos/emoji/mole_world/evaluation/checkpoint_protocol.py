"""The protocol for real checkpoints: is every concept in the picture, as itself, and in one scene?

A detector finds the subjects of a prompt, and DINOv2 compares what it found with pictures of each concept. CLIP scores
hardly follow what people see in compositions (ComposLoRA reports r = -0.006); `judging_sheet` is for that.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from mole_diffusers.options import check_options
from mole_diffusers.safe_files import json_lines
from mole_world.evaluation.measures import Models, seam
from mole_world.evaluation.methods import alone
from mole_world.evaluation.prompts import SUBJECTS, Concept
from mole_world.evaluation.report import EvaluationReport
from mole_world.evaluation.rows import SAME_NOISE, Row, Rows, digest, digest_texts, key, picture_of
from mole_world.evaluation.runner import Case, Setup, evaluate, requested_rows
from mole_world.evaluation.tables import as_frame, by_kind, concept_mean

MEASURED = ("picture", "by")  # what makes a row of measures unique
REFERENCE_SEEDS = range(4)
SCORES = ("collapse", "DINO", "CLIP-T", "LPIPS", "SSIM", "seam")
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


def unmeasured(case: Case, images: Sequence[Image.Image]) -> list[Row]:
    """Nothing yet: pictures are measured once all of them are drawn."""
    return [{} for _ in images]


class References:
    """Pictures that LoRAs draw of their concepts alone, with the first of each one's own prompts.

    Args:
        rows: where they are kept, next to the pictures that are measured.
    """

    def __init__(self, setup: Setup, names: Sequence[str], rows: Rows):
        self.setup, self.names, self.rows = setup, names, rows

    def draw(self, processes: int = 1) -> None:
        """Draw this process's share of those that are not there yet."""
        for name in self.names:
            self._with_rows(evaluate, name, metrics=unmeasured, processes=processes)

    def pictures(self) -> dict[str, list[Image.Image]]:
        """Concept -> its pictures, once all processes have drawn."""
        found = {name: self._with_rows(requested_rows, name) for name in self.names}
        return {name: [picture_of(self.rows.folder, row) for row in own] for name, own in found.items()}

    def _with_rows(self, run: Callable[..., list[Row]], name: str, **options: Any) -> list[Row]:
        case = Case((name,), "reference", self.setup.prompts[name][0])
        return run(self.setup, [alone(name)], [case], seeds=REFERENCE_SEEDS, rows=self.rows, **options)


class Measures:
    """Measures pictures of several concepts.

    Each row has: `dino` (concept -> cosine of its crop with its own pictures; 0 if no crop is left for it; of styles and
    backgrounds, the whole picture), `collapse` (whether a subject is missing, or is more like another of the prompt's
    subjects than like itself; None for fewer than two subjects), `clip_t` (cosine of picture and prompt), `seam`, and, with
    the base's picture of the same noise, `lpips` and `ssim` to that.

    Args:
        references: concept -> pictures of it alone.
    """

    def __init__(self, models: Models, concepts: Mapping[str, Concept], references: Mapping[str, Sequence[Image.Image]]):
        self.models, self.concepts = models, concepts
        pictures = digest(part for name, own in references.items() for part in (name.encode(), *(i.tobytes() for i in own)))
        subjects = digest_texts(*(f"{name}: {concepts[name].kind}, {concepts[name].subject}" for name in references))
        self.settings = models.names | {"references": pictures, "subjects": subjects}
        self.references = {name: self._reference(concepts[name], own) for name, own in references.items()}  # [P, D]

    def _reference(self, concept: Concept, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Features of a concept's own pictures; of subjects, of the crop that the detector is surest of."""
        if concept.kind not in SUBJECTS:
            return self.models.features(pictures)
        boxes = [self.models.detector.boxes(picture, [concept.subject])[:1] for picture in pictures]
        return self.models.features(
            [own[0].crop(picture) if own else picture for picture, own in zip(pictures, boxes, strict=True)]
        )

    def __call__(self, names: Sequence[str], prompt: str, image: Image.Image, base: Image.Image | None) -> Row:
        subjects = [name for name in names if self.concepts[name].kind in SUBJECTS]
        whole = [name for name in names if name not in subjects]
        dino = dict.fromkeys(subjects, 0.0)
        kept = 0
        boxes = self.models.detector.boxes(image, [self.concepts[name].subject for name in subjects]) if subjects else []
        if boxes:
            crops = self.models.features([box.crop(image) for box in boxes])  # [boxes, D]
            like = torch.stack([self._like(name, crops) for name in subjects])  # [subjects, boxes]
            for i, box in zip(*linear_sum_assignment(-like), strict=True):  # each subject has a box of its own
                dino[subjects[i]] = like[i, box].item()
                kept += bool(like[i, box] >= like[:, box].max())
        if whole:
            features = self.models.features([image])
            dino |= {name: self._like(name, features).item() for name in whole}
        collapse = kept < len(subjects) if len(subjects) > 1 else None
        lpips, ssim = (None, None) if base is None else self.models.change(image, base)
        found = {"dino": dino, "collapse": collapse, "clip_t": self.models.fit(image, prompt), "seam": seam(image)}
        return found | {"lpips": lpips, "ssim": ssim}

    def _like(self, name: str, features: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B], the mean cosine with a concept's own pictures."""
        return (features @ self.references[name].T).mean(1)


def measure(rows: Sequence[Row], measures: Measures, store: Rows, *, processes: int = 1) -> None:
    """Measure this process's share of the pictures of `rows`, as far as `store` does not have them."""
    done = {key(row, MEASURED) for row in store.read()}
    bases = {_noise(row): row for row in rows if row["method"] == "base"}
    for row in tqdm(rows, desc="measure", mininterval=5):
        about = _about(row, measures, bases)
        if zlib.crc32(about["picture"].encode()) % processes == store.process and key(about, MEASURED) not in done:
            base = picture_of(store.folder, bases[_noise(row)]) if about["by"]["base"] else None
            store.append([about | measures(row["concepts"], row["prompt"], picture_of(store.folder, row), base)])


def measured(rows: Sequence[Row], measures: Measures, store: Rows) -> list[Row]:
    """The rows with their measures, without those that are not measured."""
    found = {key(row, MEASURED): row for row in store.read()}
    bases = {_noise(row): row for row in rows if row["method"] == "base"}
    keys = [key(_about(row, measures, bases), MEASURED) for row in rows]
    return [row | found[name] for row, name in zip(rows, keys, strict=True) if name in found]


def _noise(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in SAME_NOISE)


def _about(row: Row, measures: Measures, bases: Mapping[tuple[Any, ...], Row]) -> Row:
    """What the measures of a picture depend on, besides the picture: the models, and the base's picture if it is another."""
    base = None if row["method"] == "base" else bases.get(_noise(row))
    by = measures.settings | {"base": digest_texts(key(base)) if base else None}
    return {"picture": digest_texts(key(row)), "by": by}


def frame(rows: Sequence[Row], styles: Collection[str] = ()) -> pd.DataFrame:
    """Rows as a table with `SCORES`, and DINO for the case's subjects and for its styles. A score that a row lacks is
    NaN.
    """
    found = as_frame(rows)
    named = {"clip_t": "CLIP-T", "lpips": "LPIPS", "ssim": "SSIM"}
    found = found.assign(**{score: found[name].astype(float) for name, score in named.items()})
    found["DINO"] = concept_mean(found["dino"])
    found["DINO of subjects"] = concept_mean(found["dino"], lambda concept: concept not in styles)
    found["DINO of styles"] = concept_mean(found["dino"], lambda concept: concept in styles)
    return found


def report(styles: Collection[str]) -> EvaluationReport:
    """The report. LPIPS, SSIM and CLIP-T say nothing better: LoRAs are to change the base's picture."""
    return EvaluationReport(
        frame=partial(frame, styles=styles),
        tables=(partial(by_kind, scores=SCORES),),
        values=SCORES,
        judged={"collapse": "lower", "DINO": "higher", "seam": "lower"},
        counted="DINO",
        roles=DINO_BY_ROLE,
        limits=(None, None),
        styles=styles,
    )
