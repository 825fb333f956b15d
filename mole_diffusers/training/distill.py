"""Objectives without data: match what single experts, their masked blend and the base predict.

Values are recovery errors: 0 is the teacher, 1 is as far from it as base and teacher are apart.
"""

from __future__ import annotations

import torch

from mole_diffusers.functional import onto
from mole_diffusers.training.data import Draw
from mole_diffusers.training.denoising import latent_shape, predict, sample, training_scheduler
from mole_diffusers.training.losses import recovery_error, separation_loss
from mole_diffusers.training.study import Study, Term, need
from mole_diffusers.training.teachers import (
    Memory,
    attention_maps,
    base_teacher,
    composed_teacher,
    remember,
    single_teacher,
    trigger_tokens,
)


def single(study: Study, *, seeds: int = 8, steps: int = 20, guidance: float = 3.0) -> Term:
    """L1: under one concept's prompt, predict what its LoRA alone predicts.

    Args:
        seeds, steps, guidance: remembered trajectories per expert (at least one per prompt), their length and guidance.
    """
    parts = []
    for i, (name, prompts) in enumerate(need(study.lesson.singles, "single", "prompts for each expert").items()):
        teach, seed = single_teacher(study.pipe, study.mixture, name), study.seed + i
        parts.append(remember(study.pipe, teach, prompts, seeds=seeds, steps=steps, guidance=guidance, seed=seed))
    return _recall(study, Memory.join(parts))


def composed(study: Study, *, seeds: int = 8, steps: int = 20, guidance: float = 3.0, own: float = 0.0) -> Term:
    """L2 and L3: under a composed prompt, predict the blend of the experts, subjects masked and styles everywhere.

    Args:
        seeds, steps, guidance: as for `single`, of the blend's own trajectories.
        own: share of updates on the gates' own trajectories instead, 0..1: there the gates meet their own mistakes, and
            the teacher is asked each time.
    """
    prompts = list(need(study.lesson.composed, "composed", "composed prompts"))
    teach, seed = composed_teacher(study.pipe, study.mixture, study.lesson.styles), study.seed + 99
    recall = _recall(study, remember(study.pipe, teach, prompts, seeds=seeds, steps=steps, guidance=guidance, seed=seed))

    def term(draw: Draw) -> torch.Tensor:
        if float(torch.rand((), generator=draw.generator)) >= own:
            return recall(draw)
        x, timesteps, texts = on_the_way(study, draw, prompts, steps=steps, guidance=guidance)
        x, timesteps, texts = torch.cat([x, x]), torch.cat([timesteps] * 2), ["" for _ in texts] + texts
        with torch.no_grad():
            target, base = teach(x, timesteps, texts)
        norm = (target - base).square().mean().expand(len(x))
        return recovery_error(predict(study.pipe, x, timesteps, texts), target, norm)

    return term


def base(study: Study, *, seeds: int = 8, steps: int = 20, guidance: float = 3.0) -> Term:
    """L4: under prompts that name no expert, predict what the base predicts. 1 is what the plain sum of experts changes.

    Args:
        seeds, steps, guidance: as for `single`, of the base's trajectories.
    """
    prompts, teach = need(study.lesson.plain, "base", "plain prompts"), base_teacher(study.pipe, study.mixture)
    seed = study.seed + 199
    memory = remember(study.pipe, teach, prompts, seeds=seeds, steps=steps, guidance=guidance, seed=seed)
    return _recall(study, memory)


def separate(study: Study, *, steps: int = 10, guidance: float = 3.0) -> Term:
    """L5: cross-attention to each concept's trigger words apart from the others', in the gates' own pictures.

    Args:
        steps, guidance: of the pictures, which are looked at after a random number of steps.
    """
    prompts = list(need(study.lesson.composed, "separate", "composed prompts"))
    subjects = [name for name in study.mixture.experts if name not in study.lesson.styles]
    if len(subjects) < 2:
        raise ValueError(f"the separate term needs two experts that are no styles, got {subjects}")

    def term(draw: Draw) -> torch.Tensor:
        x, timesteps, texts = on_the_way(study, draw, prompts, steps=steps, guidance=guidance)
        positions = torch.stack([trigger_tokens(study.pipe, study.mixture, name, texts) for name in subjects])  # [K, B, T]
        with attention_maps(study.pipe.unet, x.shape[2:], positions) as seen:
            predict(study.pipe, x, timesteps, texts)
        return separation_loss(torch.stack(seen, 1))

    return term


@torch.no_grad()
def on_the_way(
    study: Study, draw: Draw, prompts: list[str], *, steps: int, guidance: float
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Where the gates as they are now lead: latents [B, C, H, W] after a random number of steps, timesteps [B], prompts."""
    texts = [prompts[i] for i in draw.choice(len(prompts))]
    noise = onto(draw.normal(*latent_shape(study.pipe)), study.pipe.device)
    stop = int(torch.randint(0, steps, (), generator=draw.generator))
    scheduler = training_scheduler(study.pipe)
    scheduler.set_timesteps(steps)
    x = sample(study.pipe, noise, texts, steps=steps, guidance=guidance, stop=stop)
    return x, onto(scheduler.timesteps[stop].expand(len(x)), x.device), texts


def _recall(study: Study, memory: Memory) -> Term:
    def term(draw: Draw) -> torch.Tensor:
        pick = draw.choice(len(memory.x))
        rows = (memory.x, memory.timesteps, memory.targets, memory.norms)
        x, timesteps, targets, norms = (onto(row[pick], study.pipe.device) for row in rows)
        return recovery_error(predict(study.pipe, x, timesteps, [memory.prompts[i] for i in pick]), targets, norms)

    return term
