"""Objectives without data: match what single experts, and their masked blend, predict on their own trajectories."""

from __future__ import annotations

import torch

from mole_diffusers.training.data import Draw
from mole_diffusers.training.denoising import predict
from mole_diffusers.training.losses import recovery_error
from mole_diffusers.training.study import Study, Term
from mole_diffusers.training.teachers import Memory, composed_teacher, remember, single_teacher


def single(study: Study, *, seeds: int = 8, steps: int = 20, guidance: float = 3.0) -> Term:
    """L1: under one concept's prompt, predict what its LoRA alone predicts. A recovery error: 0 perfect, 1 the base.

    Args:
        seeds, steps, guidance: trajectories per expert (at least one per prompt), their length and their guidance.
    """
    if not study.lesson.singles:
        raise ValueError("the single term needs prompts for each expert")
    parts = [
        remember(
            study.pipe,
            single_teacher(study.pipe, study.mixture, name),
            prompts,
            seeds=seeds,
            steps=steps,
            guidance=guidance,
            seed=study.seed + i,
        )
        for i, (name, prompts) in enumerate(study.lesson.singles.items())
    ]
    return _recall(study, Memory.join(parts))


def composed(study: Study, *, seeds: int = 8, steps: int = 20, guidance: float = 3.0) -> Term:
    """L2 and L3: under a composed prompt, predict the blend of the experts, subjects masked and styles everywhere.

    Args:
        seeds, steps, guidance: as for `single`, of the blend's own trajectories.
    """
    lesson = study.lesson
    if not lesson.composed:
        raise ValueError("the composed term needs composed prompts")
    teach = composed_teacher(study.pipe, study.mixture, lesson.styles)
    seed = study.seed + 99
    memory = remember(study.pipe, teach, lesson.composed, seeds=seeds, steps=steps, guidance=guidance, seed=seed)
    return _recall(study, memory)


def _recall(study: Study, memory: Memory) -> Term:
    def term(draw: Draw) -> torch.Tensor:
        pick = draw.choice(len(memory.x))
        rows = (memory.x, memory.timesteps, memory.targets, memory.norms)
        x, timesteps, targets, norms = (t[pick].to(study.pipe.device) for t in rows)
        return recovery_error(predict(study.pipe, x, timesteps, [memory.prompts[i] for i in pick]), targets, norms)

    return term
