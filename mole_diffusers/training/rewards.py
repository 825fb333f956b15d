"""Objectives that look at pictures: what a CLIP says of them, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mole_diffusers.functional import onto
from mole_diffusers.training.clip import Clip
from mole_diffusers.training.data import Draw, Samples
from mole_diffusers.training.denoising import decode, latent_shape, predict, sample, training_scheduler
from mole_diffusers.training.losses import caption_loss, mole_clip_loss, softened
from mole_diffusers.training.study import Study, Term, need, negatives


def rollout(study: Study, *, steps: int = 8, guidance: float = 3.0, checkpointing: bool = False) -> Term:
    """DRaFT (Clark et al., 2023): a whole guided DDIM rollout from noise, differentiated through every step.

    The reward is a CLIP's: of the composed caption and captions that each lack one concept, which fits the picture?
    Cross-entropy, 0 when it is sure of the composed one. Pictures are shifted, blurred and noised a little before they are
    judged, so that no pattern of single pixels can please the CLIP.

    Args:
        steps: of the rollout; more cost memory and time in proportion.
        guidance: classifier-free guidance, 1 is without.
        checkpointing: keep one step's activations at a time, for about a third more time.
    """
    clip: Clip = need(study.clip, "rollout", "a CLIP")
    prompts = list(need(study.lesson.composed, "rollout", "composed prompts"))
    captions = [clip.text([prompt, *negatives(study, prompt)]) for prompt in prompts]  # [1 + negatives, D] each

    def term(draw: Draw) -> torch.Tensor:
        which = draw.choice(len(prompts))
        noise = onto(draw.normal(*latent_shape(study.pipe)), study.pipe.device)
        texts = [prompts[i] for i in which]
        x = sample(study.pipe, noise, texts, steps=steps, guidance=guidance, checkpointing=checkpointing)
        features = clip.image(_softened(decode(study.pipe, x), draw))  # [B, D]
        losses = [caption_loss(row, captions[i], clip.scale) for row, i in zip(features, which, strict=True)]
        return torch.stack(losses).mean()

    return term


def _softened(pictures: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Moved by up to 4 % of the side, blurred a little or not at all, with noise of up to 5 % of the range."""
    shift, blur = 0.08 * (draw.uniform(2) - 0.5), draw.uniform()
    noise = 0.1 * draw.uniform(1, 1, 1) * draw.normal(*pictures.shape[1:])
    return softened(pictures, *(onto(v, pictures.device) for v in (shift, blur, noise)))


def clip(
    study: Study,
    *,
    lengths: Sequence[int] = (20, 50),
    start: float = 0.1,
    steps: int = 2,
    last: float = 1.0,
    clean: bool = False,
    templates: Sequence[str] = ("{}",),
) -> Term:
    """MoLE's L_D as its authors ran it: a CLIP looks at every step on the way from a noised concept picture.

    A trajectory of ancestral sampling without guidance starts from a concept picture, almost all noise, and follows the
    composed prompt to its end over several updates. The gradient goes through one step of the UNet at a time.

    Args:
        lengths: least and most steps of a trajectory, drawn evenly.
        start: the first step lies within this share of the trajectory, 0..1; 0.1 is t >= 0.9 T.
        steps: denoising steps per update, whose losses are summed.
        last: the loss counts in this last share of the trajectory, 0..1; the authors' is 1.
        clean: look at the predicted clean picture instead of the half-denoised one.
        templates: texts are averaged over these ("a photo of {}"); the authors took ImageNet's.
    """
    judge: Clip = need(study.clip, "clip", "a CLIP")
    prompts = list(need(study.lesson.composed, "clip", "composed prompts"))
    samples: Samples = need(study.lesson.samples, "clip", "pictures")
    captions, sources = (_text(judge, texts, templates) for texts in (prompts, samples.captions))  # [P, D], [S, D]

    def term(draw: Draw) -> torch.Tensor:
        losses, mine = [], f"clip {draw.index}"
        for _ in range(steps):
            way = study.kept.get(mine) or _begin(study, judge, draw, lengths=lengths, start=start, last=last)
            following, seen = _advance(study, draw, way, clean=clean)
            pictures = judge.image(decode(study.pipe, seen))
            texts = torch.stack([captions[i] for i in way["prompts"]]), torch.stack([sources[i] for i in way["pictures"]])
            losses.append(mole_clip_loss(pictures, way["looks"], *texts))
            study.kept[mine] = following if following["at"] < following["length"] else None
        return torch.stack(losses).sum()

    return term


def _text(judge: Clip, captions: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    return torch.stack([judge.text([template.format(c) for c in captions]) for template in templates]).mean(0)


@torch.no_grad()
def _begin(study: Study, judge: Clip, draw: Draw, *, lengths: Sequence[int], start: float, last: float) -> dict[str, Any]:
    """A trajectory from concept pictures, brought to the first step that counts, and what the CLIP sees in the pictures."""
    pipe, samples, prompts = study.pipe, study.lesson.samples, study.lesson.composed
    assert samples is not None
    length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=draw.generator))
    at = int(torch.randint(0, int(start * (length - 1)) + 1, (), generator=draw.generator))
    pictures, texts = draw.choice(len(samples.latents)), draw.choice(len(prompts))
    latents, scheduler = samples.latents[pictures], training_scheduler(pipe)
    scheduler.set_timesteps(length)
    noise = draw.normal(*latents.shape[1:])
    x = onto(scheduler.add_noise(latents, noise, scheduler.timesteps[at].expand(len(latents))), pipe.device)
    looks = judge.image(decode(pipe, onto(latents, pipe.device)))  # [B, D]
    way: dict[str, Any] = {"x": x, "at": at, "length": length, "pictures": pictures, "prompts": texts, "looks": looks}
    while way["at"] < int((1 - last) * length):
        way, _ = _advance(study, draw, way)
    return way


def _advance(study: Study, draw: Draw, way: dict[str, Any], *, clean: bool = False) -> tuple[dict[str, Any], torch.Tensor]:
    """One step of ancestral sampling (DDIM with eta 1): the trajectory after it, and the latents that are looked at."""
    scheduler = training_scheduler(study.pipe)
    scheduler.set_timesteps(way["length"])
    x, t = way["x"], scheduler.timesteps[way["at"]]
    timesteps, prompts = onto(t.expand(len(x)), x.device), [study.lesson.composed[i] for i in way["prompts"]]
    prediction = predict(study.pipe, x, timesteps, prompts)
    noise = onto(draw.normal(*x.shape[1:]), x.device)
    after = scheduler.step(prediction, t, x, eta=1.0, variance_noise=noise)
    following = way | {"x": after.prev_sample.detach(), "at": way["at"] + 1}
    return following, after.pred_original_sample if clean else after.prev_sample
