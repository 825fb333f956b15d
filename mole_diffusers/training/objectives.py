"""All objectives of gate training by name: the context and a term -> its loss.

Those on pictures are defined here, and those in which a CLIP rates the pictures that the gates draw: its gradient trains the
gates. Those without pictures are in `distillation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mole_diffusers.binding.config import Bound
from mole_diffusers.functional import onto
from mole_diffusers.mixture import Mixture
from mole_diffusers.training.clip import Clip
from mole_diffusers.training.config import ClipTerm, CollageTerm, RolloutTerm, Term
from mole_diffusers.training.context import LossFn, TrainingContext, experts_in, negatives, require, triggers
from mole_diffusers.training.data import RandomBatch, Samples
from mole_diffusers.training.denoising import denoising_loss, predict, sample_latents
from mole_diffusers.training.distillation import base, composed, separate, single
from mole_diffusers.training.latents import decode, encode_pixels, latent_shape
from mole_diffusers.training.losses import caption_loss, cells, mole_clip_loss, side_by_side, softened
from mole_diffusers.training.networks import training_scheduler, unet_of


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


FIRST = 0.1  # the first step of a `clip` trajectory lies in this share of it: t >= 0.9 T

# ---- a CLIP rates the end of a whole rollout


def rollout(context: TrainingContext, term: RolloutTerm) -> LossFn:
    """DRaFT (Clark et al., 2023): a whole guided rollout from noise, differentiated through every step.

    The reward asks a CLIP which caption fits the picture: the composed one, or captions that each lack one concept. The
    loss is cross-entropy, 0 if the CLIP is sure of the composed caption. Pictures are slightly shifted, blurred and
    noised before the CLIP sees them, so that no pattern of single pixels can raise the reward.
    """
    clip: Clip = require(context.clip, "rollout", "a CLIP")
    prompts = list(require(context.data.composed, "rollout", "composed prompts"))
    captions = [clip.text([prompt, *negatives(context, prompt)]) for prompt in prompts]  # [1 + negatives, D] each

    def loss(batch: RandomBatch) -> torch.Tensor:
        which = batch.choice(len(prompts))
        noise = onto(batch.normal(*context.composed_shape), context.pipe.device)
        options: dict[str, Any] = {"steps": term.steps, "guidance": term.guidance, "checkpointing": term.checkpointing}
        x = sample_latents(context.pipe, noise, [prompts[i] for i in which], **options)
        features = clip.image(_augmented(decode(context.pipe, x), batch))  # [B, D]
        losses = [caption_loss(row, captions[i], clip.scale) for row, i in zip(features, which, strict=True)]
        return torch.stack(losses).mean()

    return loss


def _augmented(pictures: torch.Tensor, batch: RandomBatch) -> torch.Tensor:
    """Pictures moved by up to 4 % of the side, blurred a little or not at all, with noise of up to 5 % of the range."""
    shift, blur = 0.08 * (batch.uniform(2) - 0.5), batch.uniform()
    noise = 0.1 * batch.uniform(1, 1, 1) * batch.normal(*pictures.shape[1:])
    return softened(pictures, *(onto(v, pictures.device) for v in (shift, blur, noise)))


# ---- a CLIP rates every step, as in MoLE


def clip(context: TrainingContext, term: ClipTerm) -> LossFn:
    """MoLE's L_D: a CLIP looks at every step from a noised concept picture to a composed one.

    A trajectory of ancestral sampling without guidance starts from a concept picture that is almost all noise, and
    follows the composed prompt to its end over several updates. The gradient goes through one step of the UNet at a
    time.
    """
    judge: Clip = require(context.clip, "clip", "a CLIP")
    require(context.data.composed, "clip", "composed prompts")
    require(context.data.samples, "clip", "pictures")
    unet_of(context.pipe, "the clip term")  # for its noise schedule
    captions, begins, ends = _worded(context, judge, term)  # [P, D], [S, D], [P, D]

    def loss(batch: RandomBatch) -> torch.Tensor:
        losses, key = [], f"clip {batch.index}"
        for _ in range(term.steps):
            now = context.state.get(key)
            if now is None or len(now["x"]) != batch.own_rows:  # it may come from another number of processes
                now = _start(context, judge, batch, term)
            latents = _advance(context, batch, now)
            pictures = judge.image(decode(context.pipe, latents))
            caption = torch.stack([captions[i] for i in now["prompts"]])
            pairs = zip(now["pictures"], now["prompts"], strict=True)
            direction = torch.stack([ends[prompt] - begins[picture] for picture, prompt in pairs])
            losses.append(mole_clip_loss(pictures, now["looks"], caption, direction))
            after = now | {"x": latents.detach(), "at": now["at"] + 1}
            context.state[key] = after if after["at"] < after["length"] else None
        return torch.stack(losses).sum()

    return loss


def _worded(context: TrainingContext, judge: Clip, term: ClipTerm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of what pictures should show [P, D], and of the texts that they lead from [S, D] and to [P, D]."""
    samples, prompts = context.data.samples, context.data.composed
    assert samples is not None
    if term.wording == "captions":
        captions = judge.text(prompts)
        return captions, judge.text(samples.captions), captions
    names = [" and ".join(_called(context, caption)) or caption for caption in samples.captions]
    return judge.text([f"a {prompt}" for prompt in prompts]), _templated(judge, names), _templated(judge, prompts)


def _called(context: TrainingContext, caption: str) -> list[str]:
    """The first of the words that call each expert that a caption names."""
    return [triggers(context.mixture, name)[0] for name in experts_in(context.mixture, caption)]


def _templated(judge: Clip, texts: Sequence[str]) -> torch.Tensor:
    """Features of texts, the mean over CLIP's templates for ImageNet, such as "a photo of a {}.": [P, D]."""
    try:
        from open_clip import OPENAI_IMAGENET_TEMPLATES
    except ImportError as error:
        raise ValueError("the authors' wording needs open_clip: pip install 'mole-diffusers[evaluate]'") from error
    return torch.stack([judge.text([worded(text) for text in texts]) for worded in OPENAI_IMAGENET_TEMPLATES]).mean(0)


@torch.no_grad()
def _start(context: TrainingContext, judge: Clip, batch: RandomBatch, term: ClipTerm) -> dict[str, Any]:
    """A new trajectory: tensors and numbers, which checkpoints save.

    "x" are the latents [B, C, H, W] after "at" of "length" steps. "pictures" and "prompts" are the indices of where it
    starts and where it goes. "looks" are the CLIP's features [B, D] of those pictures.
    """
    pipe, samples, prompts = context.pipe, context.data.samples, context.data.composed
    assert samples is not None
    length = int(torch.randint(term.lengths[0], term.lengths[1] + 1, (), generator=batch.generator))
    at = int(torch.randint(0, int(FIRST * (length - 1)) + 1, (), generator=batch.generator))
    pictures, texts = batch.choice(len(samples.latents)), batch.choice(len(prompts))
    latents, scheduler = samples.latents[pictures], training_scheduler(pipe)
    scheduler.set_timesteps(length)
    noise = batch.normal(*latents.shape[1:])
    x = onto(scheduler.add_noise(latents, noise, scheduler.timesteps[at].expand(len(latents))), pipe.device)
    looks = judge.image(decode(pipe, onto(latents, pipe.device)))
    return {"x": x, "at": at, "length": length, "pictures": pictures, "prompts": texts, "looks": looks}


def _advance(context: TrainingContext, batch: RandomBatch, now: dict[str, Any]) -> torch.Tensor:
    """The latents after one more step of ancestral sampling (DDIM with eta 1)."""
    scheduler = training_scheduler(context.pipe)
    scheduler.set_timesteps(now["length"])
    x, t = now["x"], scheduler.timesteps[now["at"]]
    timesteps, prompts = onto(t.expand(len(x)), x.device), [context.data.composed[i] for i in now["prompts"]]
    prediction = predict(context.pipe, x, timesteps, prompts)
    noise = onto(batch.normal(*x.shape[1:]), x.device)
    return scheduler.step(prediction, t, x, eta=1.0, variance_noise=noise).prev_sample


OBJECTIVES: dict[str, Callable[[TrainingContext, Any], LossFn]] = {
    objective.__name__: objective for objective in (single, composed, base, separate, denoise, clip, collage, rollout)
}
