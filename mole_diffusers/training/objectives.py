"""All objectives of gate training by name: the context and a term -> its loss. Those on pictures are defined here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mole_diffusers.binding.config import Bound
from mole_diffusers.mixture import Mixture
from mole_diffusers.training.config import CollageTerm, Term
from mole_diffusers.training.context import LossFn, TrainingContext, experts_in, require
from mole_diffusers.training.data import RandomBatch, Samples
from mole_diffusers.training.denoising import denoising_loss, sample_latents
from mole_diffusers.training.distillation import base, composed, separate, single
from mole_diffusers.training.latents import decode, encode_pixels, latent_shape
from mole_diffusers.training.losses import cells, side_by_side
from mole_diffusers.training.rewards import clip, rollout


def denoise(context: TrainingContext, term: Term) -> LossFn:
    """The diffusion loss on pictures with captions."""
    samples = require(context.data.samples, "denoise", "pictures")
    return lambda batch: denoising_loss(context.pipe, samples, batch)


def collage(context: TrainingContext, term: CollageTerm) -> LossFn:
    """The diffusion loss on collages: each subject of a prompt drawn with its own experts, all side by side.

    This objective is not from a paper. A sum of LoRAs mixes up subjects. A collage shows each subject as its own LoRA
    draws it, with the composed prompt, so the gates learn to keep them apart. It needs the `parts` of a composed prompt,
    each of which names the style, if any. During this loss, the experts of a bound mixture act in the places of their
    parts, as they will when a picture is drawn.

    Raises ValueError for training data without parts, or if a prompt names an expert that none of its parts names.
    """
    prompts = require(context.data.parts, "collage", "the parts of composed prompts")
    for prompt, parts in prompts.items():
        there = {name for part in parts for name in experts_in(context.mixture, part)}
        if left_out := [name for name in experts_in(context.mixture, prompt) if name not in there]:
            raise ValueError(
                f"{prompt!r} names {left_out} and none of its parts {list(parts)} does: gates would learn to "
                "leave them out. Name a subject in one part, a style in each"
            )
    generator = torch.Generator().manual_seed(context.config.seed)
    lessons: list[tuple[Samples, dict[str, Bound] | None]] = []  # collages of a prompt, and where its experts act in them
    for prompt, parts in prompts.items():
        drawn = [draw_part(context, part, generator, term) for part in context.bar(parts, "pictures of each subject")]
        picks = torch.randint(0, term.seeds, (len(parts), term.pictures), generator=generator)
        pictures = torch.stack([d[pick] for d, pick in zip(drawn, picks, strict=True)])
        sheets = side_by_side(pictures, context.config.width, context.config.height)  # [pictures, 3, H, W]
        places = places_of(context.mixture, parts, *reversed(sheets.shape[2:]))
        sheets = encode_pixels(context.pipe, sheets)  # [pictures, C, h, w]
        lessons.append((Samples(sheets, [prompt] * term.pictures), places))

    def loss(batch: RandomBatch) -> torch.Tensor:
        samples, places = lessons[int(torch.randint(len(lessons), (), generator=batch.generator)) if len(lessons) > 1 else 0]
        with context.mixture.bound(places):
            return denoising_loss(context.pipe, samples, batch, guidance=term.guidance)

    return loss


def places_of(mixture: Mixture, parts: Sequence[str], width: int, height: int) -> dict[str, Bound] | None:
    """The binding of experts in a collage of `parts`; None if nothing is bound.

    An expert with words in a single part acts in the place of that part. The others keep their binding.
    """
    if (bound := mixture.binding) is None:
        return None
    named = [experts_in(mixture, part) for part in parts]
    for own, box in zip(named, cells(len(parts), width, height), strict=True):
        for name in own:
            if bound[name].words and sum(name in each for each in named) == 1:
                bound[name] = replace(bound[name], region=box)
    return bound


@torch.no_grad()
def draw_part(context: TrainingContext, prompt: str, generator: torch.Generator, term: CollageTerm) -> torch.Tensor:
    """Pictures [seeds, 3, H, W] of a prompt, drawn with the experts whose triggers it has, at their strengths."""
    pipe, mixture = context.pipe, context.mixture
    noise = torch.randn(term.seeds, *latent_shape(pipe), generator=generator).to(pipe.device)
    with mixture.fixed({name: mixture.strength(name) for name in experts_in(mixture, prompt)}):
        return decode(pipe, sample_latents(pipe, noise, [prompt] * term.seeds, steps=term.steps, guidance=term.guidance))


OBJECTIVES: dict[str, Callable[[TrainingContext, Any], LossFn]] = {
    objective.__name__: objective for objective in (single, composed, base, separate, denoise, clip, collage, rollout)
}
