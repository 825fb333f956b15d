"""The protocol of the embedded world: its cases, what the judge sees in a picture, and the tables of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image

from mole_diffusers import emoji
from mole_diffusers.emoji.judge import Judge
from mole_diffusers.emoji.world import EmojiWorld
from mole_diffusers.evaluation.report import Report
from mole_diffusers.evaluation.rows import SAME_NOISE, Row, digest_files
from mole_diffusers.evaluation.runner import Case, Setup
from mole_diffusers.evaluation.statistics import bootstrap, harmonic, recovery, resample_cases, share
from mole_diffusers.evaluation.tables import (
    as_frame,
    as_text,
    by_kind,
    concept_mean,
    interval,
    markdown,
    paired_table,
    success_table,
)
from mole_diffusers.lora import read_expert

if TYPE_CHECKING:
    import pandas as pd


def scene_of(concepts: Sequence[str], index: int) -> emoji.Scene:
    """The scene of a case, on a coloured background.

    Those words can be lost in a picture, and gates that were trained on the composition over white never saw the prompt.
    """
    scene, colours = emoji.composition_scene(concepts), list(emoji.BACKGROUNDS)[1:]
    turn = index // 2 if index % 2 else index // 2 + 2  # a case and the next have different ones
    return emoji.Scene(scene.subjects, scene.style, colours[turn % len(colours)])


def cases(split: Mapping[str, Sequence[emoji.Concepts]]) -> list[tuple[Case, emoji.Scene]]:
    """Every composition of a split with its scene."""
    out = []
    for kind, group in split.items():
        for i, concepts in enumerate(group):
            scene = scene_of(concepts, i)
            out.append((Case(concepts, kind, scene.caption), scene))
    return out


def setup(world: EmojiWorld, options: Mapping[str, Any]) -> Setup:
    """The world's pipeline and LoRAs.

    Args:
        options: of the pipeline call.
    """
    experts = {name: read_expert(path, name) for name, path in world.loras.items()}
    styles = frozenset(experts) & frozenset(emoji.STYLES)
    prompts = {name: own_prompts(name) for name in experts}
    base = f"emoji {digest_files(*sorted((world.folder / 'base').rglob('*.safetensors')))}"
    return Setup(world.pipe, experts, options, base, prompts=prompts, styles=styles)


def own_prompts(concept: str, count: int = 7) -> list[str]:
    """Prompts of one concept alone: a subject in the base's styles, a style over the base's subjects."""
    if concept in emoji.STYLES:
        return [emoji.Scene((subject,), concept).caption for subject in emoji.BASE_SUBJECTS[:: 28 // count][:count]]
    return [emoji.Scene((concept,), style).caption for style in emoji.BASE_STYLES[:count]]


class JudgeMetrics:
    """Measures pictures of the world's cases with the judge, which nothing was trained with.

    Each row has: `seen` (concept -> whether it is there; subjects count if they are among the judge's most likely ones),
    `success` (all seen), `subjects` (the share of them that is seen), `style`, `background`, `likeness` (subject -> cosine
    of the judge's mean features in that subject's place with those of the artist's own drawing there, both less their mean
    over drawings of base subjects in that style), and for several subjects `own_place` (the share of places where the one
    that belongs there is stronger than the others that were asked for).

    Args:
        scenes: prompt -> its scene.
    """

    def __init__(self, world: EmojiWorld, scenes: Mapping[str, emoji.Scene]):
        self.judge: Judge = world.judge()
        self.drawings, self.scenes = world.drawings, scenes

    def __call__(self, case: Case, images: Sequence[Image.Image]) -> list[Row]:
        scene = self.scenes[case.prompt]
        verdict = self.judge.verdict(images)
        subjects = self.judge.sees(verdict, scene.subjects)  # [B, subjects]
        style, background = self.judge.is_style(verdict, scene.style), self.judge.is_background(verdict, scene.background)
        likeness, places = self._likeness(scene, images), self._own_place(scene, images)
        rows: list[Row] = []
        for i in range(len(images)):
            seen = dict(zip(scene.subjects, subjects[i].tolist(), strict=True)) | {scene.style: bool(style[i])}
            asked = {concept: seen[concept] for concept in case.concepts}
            rows.append(
                {
                    "seen": asked,
                    "success": all(asked.values()),
                    "subjects": subjects[i].float().mean().item(),
                    "style": bool(style[i]),
                    "background": bool(background[i]),
                    "likeness": likeness[i],
                    "own_place": places[i],
                }
            )
        return rows

    def _likeness(self, scene: emoji.Scene, images: Sequence[Image.Image]) -> list[dict[str, float]]:
        count, known = len(scene.subjects), emoji.BASE_SUBJECTS
        others = [replace(scene, subjects=(known[i:] + known)[:count]) for i in range(len(known))]
        centre = self._in_places(count, [self.drawings.picture(other) for other in others]).mean(0)  # [S, C]
        truth = self._in_places(count, [self.drawings.picture(scene)]) - centre  # [1, S, C]
        own = self._in_places(count, images) - centre  # [B, S, C]
        found = F.cosine_similarity(own, truth, dim=-1).tolist()
        return [dict(zip(scene.subjects, row, strict=True)) for row in found]

    def _in_places(self, count: int, images: Sequence[Image.Image]) -> torch.Tensor:
        """[B, count, C]: the mean feature in the place of each of `count` subjects."""
        features = self.judge.features(images)  # [B, C, 4, 4]
        return torch.stack([features[..., a:b].mean((2, 3)) for a, b in columns_of(count)], 1)

    def _own_place(self, scene: emoji.Scene, images: Sequence[Image.Image]) -> list[float | None]:
        count = len(scene.subjects)
        if count == 1:
            return [None] * len(images)
        columns = self.judge.subject_map(images).logsumexp(2)  # [B, S, 4] over rows of places
        index = [self.judge.subjects.index(s) for s in scene.subjects]
        strength = torch.stack([columns[:, index, a:b].amax(-1) for a, b in columns_of(count)], -1)
        own = strength.argmax(1) == torch.arange(count)  # [B, place]: whether the strongest subject there belongs there
        return own.float().mean(1).tolist()


def columns_of(count: int) -> list[tuple[int, int]]:
    """First and end of the judge's four columns that each of `count` subjects side by side stands in."""
    edges = [round(4 * i / count) for i in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a table, with `likeness` as its mean over subjects, and the figures' names for `subjects` and `style`."""
    found = as_frame(rows)
    found["likeness"] = concept_mean(found["likeness"])
    found["subject seen"], found["style seen"] = found["subjects"], found["style"]
    return found


def concept_table(rows: pd.DataFrame) -> str:
    """What stands behind success, by arm.

    The share of concepts seen, recovery (of what the single LoRA shows on the same seeds), the harmonic mean over a case's
    concepts, likeness to the artist's drawing, style, background, and the share of subjects in their own place.
    """
    alone = {
        (*place, concept): seen[concept]
        for arm, seen, *place in rows[["arm", "seen", *SAME_NOISE]].itertuples(index=False)
        for concept in seen
        if arm == f"alone {concept}"
    }
    body = []
    for arm, own in rows.groupby("composer", sort=False):
        cases = [case for _, case in own.groupby(["arm", "case"], sort=False)]  # each single LoRA on each case by itself
        seen, drawn = _seen(cases, alone), resample_cases(len(cases))  # [G, S, 2, C]
        body.append(
            [
                arm,
                as_text(bootstrap(seen[:, :, 0], drawn, share)),
                as_text(bootstrap(seen, drawn, recovery)),
                as_text(bootstrap(seen[:, :, 0], drawn, harmonic)),
                *(interval(own, value) for value in ("likeness", "style", "background")),
                interval(own.dropna(subset=["own_place"]), "own_place"),
            ]
        )
    head = ["arm", "concepts seen", "recovery", "harmonic mean", "likeness", "style", "background", "own place"]
    return markdown(head, body)


def _seen(cases: Sequence[pd.DataFrame], alone: Mapping[tuple, bool]) -> torch.Tensor:
    """[G, S, 2, C]: whether each concept is seen, and is with its LoRA alone on the same noise; NaN where there is none."""
    seeds, concepts = max(map(len, cases)), max(len(case["seen"].iloc[0]) for case in cases)
    table = torch.full((len(cases), seeds, 2, concepts), torch.nan)
    for g, case in enumerate(cases):
        for s, (seen, *place) in enumerate(case[["seen", *SAME_NOISE]].itertuples(index=False)):
            for c, (concept, there) in enumerate(seen.items()):
                table[g, s, :, c] = torch.tensor([float(there), float(alone.get((*place, concept), torch.nan))])
    return table


REPORT = Report(
    frame=frame,
    tables=(success_table, partial(by_kind, table=concept_table)),
    paired=paired_table,
    values=("success",),
    roles=("subject seen", "style seen"),
    count_value="success",
    limits=(0, 1),
    styles=emoji.STYLES,
)
