"""Gate training: setup -> fit. Only the gates' parameters move."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mole_diffusers import mixing
from mole_diffusers.mixture import Mixture
from mole_diffusers.training.data import Samples
from mole_diffusers.training.denoising import denoising_loss, predict
from mole_diffusers.training.losses import recovery_error
from mole_diffusers.training.teachers import Memory, composed_teacher, remember, single_teacher

STATE = "training.pt"


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained. Weights of terms are 0 or more; a term at 0 is not computed.

    Attributes:
        single: weight of L1: under one concept's prompt, predict what its LoRA alone predicts.
        composed: weight of L2 and L3: under a composed prompt, predict the masked blend of the experts.
        denoise: weight of the diffusion loss on concept pictures; needs samples.
        balance: weight of MoLE's balance loss, its alpha (the paper has 0.5).
        styles: experts that act on the whole picture, without a mask.
        steps, batch, lr: updates, rows per update, AdamW's rate (pooled gates need about 1e-2, flattened 1e-5).
        seeds, sampler_steps, guidance: trajectories per source, their length, and their guidance.
        autocast: "bf16", "fp16" or None.
        every: updates between checkpoints.
    """

    single: float = 1.0
    composed: float = 1.0
    denoise: float = 0.0
    balance: float = 0.0
    styles: tuple[str, ...] = ()
    steps: int = 150
    batch: int = 12
    lr: float = 1e-2
    seeds: int = 8
    sampler_steps: int = 20
    guidance: float = 3.0
    seed: int = 0
    autocast: str | None = None
    every: int = 50

    def __post_init__(self) -> None:
        terms = (self.single, self.composed, self.denoise, self.balance)
        if min(terms) < 0 or max(terms[:3]) == 0:
            raise ValueError(f"weights of single, composed and denoise must be 0 or more and not all 0, got {terms[:3]}")
        if self.autocast not in DTYPES:
            raise ValueError(f"unknown autocast {self.autocast!r}; known: {list(DTYPES)}")


DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Lesson:
    """What there is to learn from: prompts per expert, composed prompts, and pictures if there are any."""

    singles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    composed: Sequence[str] = ()
    samples: Samples | None = None


def train_gates(
    pipe: Any, mixture: Mixture, lesson: Lesson, config: GateTraining, *, folder: str | Path | None = None
) -> list[dict]:
    """Train the gates of an attached mixture; base and experts stay as they are.

    Args:
        folder: checkpoints and `log.jsonl` go here; a run that was cut off goes on from its last checkpoint.

    Returns:
        One {"step", "loss", term: value} per update.

    Raises:
        ValueError: a term without what it needs, an unknown expert, a loss that is not finite (the last checkpoint stays).
    """
    if not mixture.parameters():
        raise ValueError(f"gates of family {mixture.config.family!r} have nothing to train")
    memory = prepare(pipe, mixture, lesson, config)
    return fit(pipe, mixture, memory, lesson.samples, config, Path(folder) if folder else None)


def prepare(pipe: Any, mixture: Mixture, lesson: Lesson, config: GateTraining) -> Memory | None:
    """Check the lesson and sample the teachers' trajectories."""
    for name in (*lesson.singles, *config.styles):
        mixture.strength(name)
    if config.single and not lesson.singles:
        raise ValueError("the single term needs prompts for each expert")
    if config.composed and not lesson.composed:
        raise ValueError("the composed term needs composed prompts")
    if config.denoise and lesson.samples is None:
        raise ValueError("the denoise term needs pictures")
    options: dict[str, Any] = {"seeds": config.seeds, "steps": config.sampler_steps, "guidance": config.guidance}
    parts = []
    with _autocast(pipe, config):
        if config.single:
            for i, (name, prompts) in enumerate(lesson.singles.items()):
                teach = single_teacher(pipe, mixture, name)
                parts.append(remember(pipe, teach, prompts, source="single", seed=config.seed + i, **options))
        if config.composed:
            teach = composed_teacher(pipe, mixture, config.styles)
            parts.append(remember(pipe, teach, lesson.composed, source="composed", seed=config.seed + 99, **options))
    return Memory.join(parts) if parts else None


def fit(
    pipe: Any, mixture: Mixture, memory: Memory | None, samples: Samples | None, config: GateTraining, folder: Path | None
) -> list[dict]:
    """The loop. Each update's randomness follows from the seed and its number, so that a resumed run is the same run."""
    parameters = mixture.parameters()
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / config.steps))
    log, start = _resume(mixture, optimizer, schedule, config, folder)
    frozen = [p for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()) if p.requires_grad]
    gates = {id(p) for p in parameters}
    frozen = [p for p in frozen if id(p) not in gates]
    for p in frozen:
        p.requires_grad_(False)
    try:
        bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="gates", mininterval=2)
        for step in bar:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            terms = _terms(pipe, mixture, memory, samples, config, generator)
            loss = sum(getattr(config, name) * value for name, value in terms.items())
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is not finite at step {step}: { {k: v.item() for k, v in terms.items()} }")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            log.append({"step": step, "loss": loss.item(), **{k: v.item() for k, v in terms.items()}})
            bar.set_postfix({k: f"{v:.3f}" for k, v in log[-1].items() if k != "step"}, refresh=False)
            if folder and ((step + 1) % config.every == 0 or step + 1 == config.steps):
                _save(mixture, optimizer, schedule, config, folder, log)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return log


def _terms(
    pipe: Any,
    mixture: Mixture,
    memory: Memory | None,
    samples: Samples | None,
    config: GateTraining,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Each active term, unweighted."""
    terms: dict[str, torch.Tensor] = {}
    weights: list[torch.Tensor] = []
    with _autocast(pipe, config), mixture.listen(lambda _, w: weights.append(w)):
        if memory is not None:
            terms |= _recovery_terms(pipe, memory, config, generator)
        if config.denoise and samples is not None:
            terms["denoise"] = denoising_loss(pipe, samples, generator, batch=config.batch)
    if config.balance:
        terms["balance"] = mixing.balance_loss(weights)
    return terms


def _recovery_terms(pipe: Any, memory: Memory, config: GateTraining, generator: torch.Generator) -> dict[str, torch.Tensor]:
    pick = torch.randint(0, len(memory.x), (config.batch,), generator=generator)
    rows = [t[pick].to(pipe.device) for t in (memory.x, memory.timesteps, memory.targets, memory.norms)]
    x, timesteps, targets, norms = rows
    student = predict(pipe, x, timesteps, [memory.prompts[i] for i in pick.tolist()])
    terms = {}
    for source in ("single", "composed"):
        chosen = torch.tensor([memory.sources[i] == source for i in pick.tolist()], device=x.device)
        if getattr(config, source) and chosen.any():
            terms[source] = recovery_error(student[chosen], targets[chosen], norms[chosen])
    return terms


def _autocast(pipe: Any, config: GateTraining) -> AbstractContextManager:
    dtype = DTYPES[config.autocast]
    return nullcontext() if dtype is None else torch.autocast(pipe.device.type, dtype)


def _save(mixture: Mixture, optimizer: Any, schedule: Any, config: GateTraining, folder: Path, log: list[dict]) -> None:
    mixture.save_pretrained(folder)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "log": log, "config": asdict(config)}
    torch.save(state, folder / f"{STATE}.tmp")
    (folder / f"{STATE}.tmp").rename(folder / STATE)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


def _resume(
    mixture: Mixture, optimizer: Any, schedule: Any, config: GateTraining, folder: Path | None
) -> tuple[list[dict], int]:
    """The log so far and the next step; the gates, optimizer and schedule are set to where they stood."""
    if folder is None or not (folder / STATE).exists():
        return [], 0
    from mole_diffusers import checkpoint

    state = torch.load(folder / STATE, weights_only=True)
    if state["config"] != asdict(config):
        changed = [k for k, v in asdict(config).items() if state["config"].get(k) != v]
        raise ValueError(f"{folder} holds a run with other settings ({', '.join(changed)}); use another folder")
    checkpoint.load(folder).fill(mixture.banks)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["log"], len(state["log"])
