"""The protocol of the embedded world: its cases, what the judge sees in a picture, and tables of this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from PIL import Image

from mole_diffusers.lora import read_expert
from mole_world import words
from mole_world.compositions import Concepts
from mole_world.drawings import Drawings
from mole_world.evaluation.report import EvaluationReport
from mole_world.evaluation.rows import Row, digest_files
from mole_world.evaluation.runner import Case, Setup
from mole_world.evaluation.tables import as_frame, by_kind, concept_mean, success_table
from mole_world.judge import Judge
from mole_world.measures import touches_as_said
from mole_world.scenes import CONTACTS, Scene, composition_scene
from mole_world.world import EmojiWorld

OWN = 7  # prompts of one concept alone
NEAR = 2  # places of the judge, 16 pixels each; subjects closer than this are blended into one
STYLES = ("noto", "watercolour", "twemoji", "pastel")  # of compositions that have none
CLOSE = ((96, 64), (64, 96))  # canvases on which two subjects have 48 pixels each


def scene_of(kind: str, concepts: Concepts, index: int) -> Scene:
    """The scene of composition `index` of its kind, in an open landscape unless the kind says paper.

    Pairs are alternately wide and tall. Relations of contact take turns, and so do the base's styles in STYLES for
    compositions without one.
    """
    scene = composition_scene(concepts)
    if scene.style not in concepts:
        scene = replace(scene, style=STYLES[index % len(STYLES)])
    if kind == "contact":
        return replace(scene, relation=list(CONTACTS)[index % len(CONTACTS)])
    if kind == "two subjects, close":
        return replace(scene, canvas=CLOSE[index % 2])
    background = "white" if kind == "two subjects on paper" else scene.background
    return replace(scene, background=background, upright=bool(index % 2))


def cases(split: Mapping[str, Sequence[Concepts]]) -> list[tuple[Case, Scene]]:
    """Every composition of a split with its scene."""
    found = []
    for kind, group in split.items():
        for i, concepts in enumerate(group):
            scene = scene_of(kind, concepts, i)
            found.append((Case(concepts, kind, scene.caption, size=scene.size), scene))
    return found


def setup(world: EmojiWorld, options: Mapping[str, Any], **others: Any) -> Setup:
    """The world's pipeline and LoRAs.

    Args:
        options: of the pipeline call.
        others: further fields of the setup.
    """
    experts = {name: read_expert(path, name) for name, path in world.loras.items()}
    styles = frozenset(experts) & frozenset(words.STYLES)
    prompts = {name: own_prompts(name) for name in experts}
    base = f"emoji {digest_files(*sorted((world.folder / 'base').rglob('*.safetensors')))}"
    return Setup(world.pipe, experts, options, base, prompts=prompts, styles=styles, **others)


def own_prompts(concept: str) -> list[str]:
    """Prompts for one concept alone: a subject in the base's styles, a style on the base's subjects."""
    if concept in words.STYLES:
        some = words.BASE_SUBJECTS[:: len(words.BASE_SUBJECTS) // OWN]
        return [Scene((subject,), concept).caption for subject in some[:OWN]]
    return [Scene((concept,), style).caption for style in words.BASE_STYLES[:OWN]]


class JudgeMetrics:
    """Measures pictures of cases with the judge, which nothing was trained with.

    Each row has: `seen` (concept -> whether it is there), `all seen`, `one scene`, `success` (both, and the right one in
    front if two are in contact), `subjects` (the share of them that is seen), `style`, `background`, `in order` (None
    without contact), `another` (whether a subject is seen that nobody asked for), and `apart` (whether the likeliest places
    of its subjects are two places or more apart; None for a single subject). The judge only knows the world's canvases, so
    larger pictures are shrunk to those of their scenes.

    Args:
        found: cases with their scenes, as `cases` returns them.
    """

    def __init__(self, judge: Judge, drawings: Drawings, found: Iterable[tuple[Case, Scene]]):
        self.judge, self.drawings = judge, drawings
        self.scenes = {(case.prompt, case.size): scene for case, scene in found}

    def __call__(self, case: Case, images: Sequence[Image.Image]) -> list[Row]:
        scene = self.scenes[case.prompt, case.size]
        images = [image if image.size == scene.size else image.resize(scene.size) for image in images]
        verdict = self.judge.verdict(images)
        there = self.judge.sees(verdict, scene.subjects)  # [B, subjects]
        style, background = self.judge.is_style(verdict, scene.style), self.judge.is_background(verdict, scene.background)
        apart, whole = self._apart(scene, images), self.judge.is_one_scene(verdict)
        another = self.judge.sees_another(verdict, scene.subjects)
        ordered = [touches_as_said(image, self.drawings, scene) if scene.relation in CONTACTS else None for image in images]
        rows: list[Row] = []
        for i in range(len(images)):
            seen = dict(zip(scene.subjects, there[i].tolist(), strict=True)) | {scene.style: bool(style[i])}
            asked = {concept: seen[concept] for concept in case.concepts}
            row: Row = {"seen": asked, "all seen": all(asked.values()), "one scene": bool(whole[i]), "in order": ordered[i]}
            row["success"] = row["all seen"] and row["one scene"] and ordered[i] is not False
            row["subjects"] = there[i].float().mean().item()
            row |= {"style": bool(style[i]), "background": bool(background[i]), "another": bool(another[i])}
            rows.append(row | {"apart": apart[i]})
        return rows

    def _apart(self, scene: Scene, images: Sequence[Image.Image]) -> list[bool | None]:
        if len(scene.subjects) == 1:
            return [None] * len(images)
        maps = self.judge.subject_map(images)[
            :, [self.judge.labels.subjects.index(s) for s in scene.subjects]
        ]  # [B, k, h, w]
        likeliest, wide = maps.flatten(2).argmax(-1), maps.shape[-1]
        at = torch.stack([likeliest // wide, likeliest % wide], -1)  # [B, k, 2]: row and column
        far = (at[:, :, None] - at[:, None]).abs().amax(-1) >= NEAR  # [B, k, k]
        return (far | torch.eye(len(scene.subjects), dtype=torch.bool)).flatten(1).all(1).tolist()


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a table, with the share of a case's concepts that are seen."""
    found = as_frame(rows)
    found["concepts seen"] = concept_mean(found["seen"])
    return found


REPORT = EvaluationReport(
    frame=frame,
    tables=(
        success_table,
        # Details of success: single concepts, and whether several subjects are apart.
        partial(
            by_kind,
            scores=("all seen", "one scene", "in order", "concepts seen", "style", "background", "another", "apart"),
            digits=2,
        ),
    ),
    values=("success",),
    judged={"success": "higher"},
    counted="success",
    roles=("subjects", "style"),
    limits=(0, 1),
    styles=words.STYLES,
)
