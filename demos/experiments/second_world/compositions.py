"""Which held-out concepts are composed, on which canvas, and what the judge sees in a picture of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import words
from judge import Judge
from PIL import Image
from scenes import Scene, composition_scene
from words import BACKGROUNDS

from mole_diffusers.evaluation.rows import Row
from mole_diffusers.evaluation.runner import Case

Concepts = tuple[str, ...]
NEAR = 2  # places of the judge, of 16 pixels: subjects whose likeliest places are nearer stand in one another


def compositions(subjects: Sequence[str], styles: Sequence[str], counts: Mapping[str, int]) -> dict[str, list[Concepts]]:
    """Kind -> the first `counts[kind]` compositions; each subject and style comes about equally often."""
    n, m = len(subjects), len(styles)
    turns = [(i, (i + 1 + shift) % n) for shift in range(n // 2) for i in range(n) if shift < n // 2 - 1 or i < n // 2]
    pairs: list[Concepts] = [(subjects[i], subjects[j]) for i, j in turns]
    kinds: dict[str, list[Concepts]] = {
        "subject x style": [(subjects[i], styles[(i + shift) % m]) for shift in range(m) for i in range(n)],
        "two subjects": pairs,
        "two subjects + style": [(*pair, styles[i % m]) for i, pair in enumerate(pairs)],
        "three subjects": [(subjects[i], subjects[(i + 1) % n], subjects[(i + 3) % n]) for i in range(n)],
    }
    return {kind: kinds[kind][:count] for kind, count in counts.items()}


SPLITS = {
    "test": compositions(
        words.TEST_SUBJECTS,
        words.TEST_STYLES,
        {"subject x style": 24, "two subjects": 24, "two subjects + style": 24, "three subjects": 8},
    ),
    "validation": compositions(
        words.VALIDATION_SUBJECTS,
        words.VALIDATION_STYLES,
        {"subject x style": 8, "two subjects": 6, "two subjects + style": 6, "three subjects": 4},
    ),
}


def scene_of(concepts: Concepts, index: int) -> Scene:
    """The scene of composition `index` of its kind, on a coloured background, wide and tall in turn."""
    colours = list(BACKGROUNDS)[1:]
    return replace(composition_scene(concepts), background=colours[index % len(colours)], upright=bool(index % 2))


def cases(split: Mapping[str, Sequence[Concepts]]) -> list[tuple[Case, Scene]]:
    """Every composition of a split with its scene."""
    found = []
    for kind, group in split.items():
        for i, concepts in enumerate(group):
            scene = scene_of(concepts, i)
            found.append((Case(concepts, kind, scene.caption, size=scene.size), scene))
    return found


def squares(case: Case) -> list[tuple[float, float, float, float]]:
    """A square of the canvas for each subject, in the order of naming: left to right, top to bottom."""
    width, height = case.size or (1, 1)
    across, down = max(1, round(width / 64)), max(1, round(height / 64))
    return [(x / across, y / down, (x + 1) / across, (y + 1) / down) for y in range(down) for x in range(across)]


class JudgeMetrics:
    """Measures pictures of cases with the judge, which nothing was trained with.

    Each row has: `seen` (concept -> whether it is there), `success` (all seen), `subjects` (the share of them that is seen),
    `style`, `background`, and `apart` (do the likeliest places of its subjects lie two places or more from one another;
    None for a single one).

    Args:
        scenes: (prompt, size) -> its scene.
    """

    def __init__(self, judge: Judge, scenes: Mapping[tuple[str, tuple[int, int]], Scene]):
        self.judge, self.scenes = judge, scenes

    def __call__(self, case: Case, images: Sequence[Image.Image]) -> list[Row]:
        scene = self.scenes[case.prompt, case.size or images[0].size]
        verdict = self.judge.verdict(images)
        there = self.judge.sees(verdict, scene.subjects)  # [B, subjects]
        style, background = self.judge.is_style(verdict, scene.style), self.judge.is_background(verdict, scene.background)
        apart = self._apart(scene, images)
        rows: list[Row] = []
        for i in range(len(images)):
            seen = dict(zip(scene.subjects, there[i].tolist(), strict=True)) | {scene.style: bool(style[i])}
            asked = {concept: seen[concept] for concept in case.concepts}
            row = {"seen": asked, "success": all(asked.values()), "subjects": there[i].float().mean().item()}
            rows.append(row | {"style": bool(style[i]), "background": bool(background[i]), "apart": apart[i]})
        return rows

    def _apart(self, scene: Scene, images: Sequence[Image.Image]) -> list[bool | None]:
        if len(scene.subjects) == 1:
            return [None] * len(images)
        maps = self.judge.subject_map(images)[:, [self.judge.subjects.index(s) for s in scene.subjects]]  # [B, k, h, w]
        likeliest, wide = maps.flatten(2).argmax(-1), maps.shape[-1]
        at = torch.stack([likeliest // wide, likeliest % wide], -1)  # [B, k, 2]: row and column
        far = (at[:, :, None] - at[:, None]).abs().amax(-1) >= NEAR  # [B, k, k]
        return (far | torch.eye(len(scene.subjects), dtype=torch.bool)).flatten(1).all(1).tolist()
