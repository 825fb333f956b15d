"""Objectives that look at finished pictures: what a CLIP says of them, with the gradient through the sampler."""

from __future__ import annotations

import torch

from mole_diffusers.training.clip import Clip
from mole_diffusers.training.data import Draw
from mole_diffusers.training.denoising import decode, latent_shape, sample
from mole_diffusers.training.losses import caption_loss, softened
from mole_diffusers.training.study import Study, Term, negatives


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
    clip, prompts = _clip(study, "rollout"), list(study.lesson.composed)
    if not prompts:
        raise ValueError("the rollout term needs composed prompts")
    captions = [clip.text([prompt, *negatives(study, prompt)]) for prompt in prompts]  # [1 + negatives, D] each

    def term(draw: Draw) -> torch.Tensor:
        which = draw.choice(len(prompts))
        noise = draw.normal(*latent_shape(study.pipe)).to(study.pipe.device)
        texts = [prompts[i] for i in which]
        x = sample(study.pipe, noise, texts, steps=steps, guidance=guidance, checkpointing=checkpointing)
        features = clip.image(_softened(decode(study.pipe, x), draw))  # [B, D]
        losses = [caption_loss(row, captions[i], clip.scale) for row, i in zip(features, which, strict=True)]
        return torch.stack(losses).mean()

    return term


def _clip(study: Study, term: str) -> Clip:
    if study.clip is None:
        raise ValueError(f"the {term} term needs a CLIP")
    return study.clip


def _softened(pictures: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Moved by up to 4 % of the side, blurred a little or not at all, with noise of up to 5 % of the range."""
    shift, blur = 0.08 * (draw.uniform(2) - 0.5), draw.uniform()
    noise = 0.1 * draw.uniform(1, 1, 1) * draw.normal(*pictures.shape[1:])
    return softened(pictures, *(v.to(pictures.device) for v in (shift, blur, noise)))
