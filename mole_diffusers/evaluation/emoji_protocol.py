"""The protocol of the embedded world: what the judge sees, beside the artist's own drawing of what was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from mole_diffusers import emoji
from mole_diffusers.emoji.judge import Judge
from mole_diffusers.emoji.world import EmojiWorld
from mole_diffusers.evaluation.digests import of_files
from mole_diffusers.evaluation.rows import Row
from mole_diffusers.evaluation.runner import Bench, Case
from mole_diffusers.lora import read_expert


def scene_of(concepts: Sequence[str], index: int) -> emoji.Scene:
    """The scene of a case. It asks for a coloured background: its words can be lost, and gates that learned the composition
    over white never saw the prompt."""
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


def bench(world: EmojiWorld, options: Mapping[str, Any]) -> Bench:
    """The world's pipeline and LoRAs; a concept's own prompts show it in what the base knows.

    Args:
        options: of the pipeline call.
    """
    experts = {name: read_expert(path, name) for name, path in world.loras.items()}
    styles = frozenset(experts) & frozenset(emoji.STYLES)
    prompts = {name: own_prompts(name) for name in experts}
    base = f"emoji {of_files(*sorted((world.folder / 'base').rglob('*.safetensors')))}"
    return Bench(world.pipe, experts, options, base, prompts=prompts, styles=styles)


def own_prompts(concept: str, count: int = 7) -> list[str]:
    """Prompts of one concept on its own: a subject in the base's styles, a style over the base's subjects."""
    if concept in emoji.STYLES:
        return [emoji.Scene((subject,), concept).caption for subject in emoji.BASE_SUBJECTS[:: 28 // count][:count]]
    return [emoji.Scene((concept,), style).caption for style in emoji.BASE_STYLES[:count]]


class Look:
    """Measures pictures of the world's cases by the judge, which nothing was trained with.

    Each row says: `seen` (concept -> is it there; of subjects the judge's most likely ones count), `success` (all seen),
    `subjects` (share of them seen), `style`, `background`, `likeness` (subject -> cosine of the judge's mean features in
    that subject's place with those of the artist's own drawing there, both less their mean over drawings of base subjects
    in that style), and for several subjects `own_place` (share of places where the one that belongs there is stronger than
    the others that were asked for).
    """

    def __init__(self, world: EmojiWorld, scenes: Mapping[str, emoji.Scene]):
        self.judge: Judge = world.judge()
        self.drawings, self.scenes = world.drawings, scenes

    def __call__(self, case: Case, images: Sequence[Image.Image]) -> list[Row]:
        scene = self.scenes[case.prompt]
        verdict = self.judge.verdict(images)
        subjects = self.judge.sees(verdict, scene.subjects)  # [B, subjects]
        style, ground = self.judge.is_style(verdict, scene.style), self.judge.is_background(verdict, scene.background)
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
                    "background": bool(ground[i]),
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
        """[B, count, C]: the mean feature of each of `count` subjects' places."""
        features = self.judge.features(images)  # [B, C, 4, 4]
        return torch.stack([features[..., a:b].mean((2, 3)) for a, b in columns_of(count)], 1)

    def _own_place(self, scene: emoji.Scene, images: Sequence[Image.Image]) -> list[float | None]:
        count = len(scene.subjects)
        if count == 1:
            return [None] * len(images)
        columns = self.judge.subject_map(images).logsumexp(2)  # [B, S, 4] over rows of places
        index = [self.judge.subjects.index(s) for s in scene.subjects]
        strength = torch.stack([columns[:, index, a:b].amax(-1) for a, b in columns_of(count)], -1)
        own = strength.argmax(1) == torch.arange(count)  # [B, place]: the strongest subject of a place is its own
        return own.float().mean(1).tolist()


def columns_of(count: int) -> list[tuple[int, int]]:
    """First and end of the judge's four columns that each of `count` subjects side by side stands in."""
    edges = [round(4 * i / count) for i in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))
