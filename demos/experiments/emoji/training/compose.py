"""What training and evaluation of compositions share: names, prompts, sampling, and the joint LoRA's pictures."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from make_loras import concept_samples

from mole_diffusers import emoji
from mole_diffusers.evaluation import emoji_protocol
from mole_diffusers.evaluation.runner import Case, add_idle_experts
from mole_diffusers.training.data import Samples, TrainingData

COMPARED_PAIRS = {"subject + subject": emoji.COMPARED[8:16]}  # those of the test that trained gates are compared on
OTHERS = ("bear", "lemon", "penguin", "carrot", "turtle", "pizza", "rose", "lion")  # base subjects in prompts


def name_of(concepts: Sequence[str]) -> str:
    """The file name of a composition: "fox+french_fries+ink"."""
    return "+".join(concepts).replace(" ", "_")


def unseen_backgrounds(concepts: Sequence[str]) -> list[str]:
    """All backgrounds except the one that the composition is evaluated on, so that no evaluated prompt is trained on."""
    found = [pair for split in (emoji.TEST, emoji.VALIDATION) for pair in emoji_protocol.cases(split)]
    (asked,) = (scene.background for case, scene in found if case.concepts == tuple(concepts))
    return [background for background in emoji.BACKGROUNDS if background != asked]


def lesson(concepts: Sequence[str], backgrounds: Sequence[str] = ("white",)) -> TrainingData:
    """Prompts for data-free training: each concept on its own in the base's styles and subjects, and the composition on each
    of the backgrounds."""
    scene = emoji.composition_scene(concepts)
    singles: dict[str, list[str]] = {}
    for concept in concepts:
        if concept in emoji.STYLES:
            singles[concept] = [emoji.Scene((other,), concept).caption for other in OTHERS]
            continue
        slot = scene.subjects.index(concept)
        singles[concept] = []
        for i, style in enumerate(emoji.BASE_STYLES):
            alone = i % 2 == 0 or len(scene.subjects) == 1
            beside = (concept, OTHERS[i]) if slot == 0 else (OTHERS[i], concept)
            singles[concept].append(emoji.Scene((concept,) if alone else beside, style).caption)
    styles = [c for c in concepts if c in emoji.STYLES]
    parts = {
        replace(scene, background=ground).caption: [emoji.Scene((s,), "noto", ground).caption for s in scene.subjects]
        for ground in backgrounds
    }
    return TrainingData(singles, list(parts), _others(concepts), styles=styles, parts=parts)


def _others(concepts: Sequence[str]) -> dict[str, list[str]]:
    """Words that can replace each concept in a prompt: others of its kind, also those of the composition."""
    kinds = {c: emoji.BASE_STYLES if c in emoji.STYLES else OTHERS[:4] for c in concepts}
    rivals = {c: [o for o in concepts if o != c and o not in emoji.STYLES and c not in emoji.STYLES] for c in concepts}
    return {c: [*rivals[c], *kinds[c]] for c in concepts}


def crowd() -> list[Case]:
    """The compared pairs of subjects, with zero to four idle LoRAs attached."""
    found = [case for case, _ in emoji_protocol.cases(COMPARED_PAIRS)]
    return add_idle_experts(found, emoji.TEST_SUBJECTS + emoji.TEST_STYLES, range(2, 7))


def joint_samples(world, concepts: Sequence[str]) -> Samples:
    """Every concept's own pictures together; never two of the concepts in one picture."""
    parts = [concept_samples(world, c, 384) for c in concepts]
    return Samples(torch.cat([p.latents for p in parts]), [c for p in parts for c in p.captions])


def true_samples(world, concepts: Sequence[str], encode, count: int = 96) -> Samples:
    """The composition's own drawings, which no composer may see. Only the oracle is trained on them."""
    import numpy as np

    rng, scene = np.random.default_rng(7), emoji.composition_scene(concepts)
    backgrounds = ["white", "white", *list(emoji.BACKGROUNDS)[1:]]
    chosen = [emoji.Scene(scene.subjects, scene.style, str(rng.choice(backgrounds))) for _ in range(count)]
    return encode(world.pipe, [world.drawings.picture(s, rng) for s in chosen], [s.caption for s in chosen])
