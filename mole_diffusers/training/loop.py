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
from mole_diffusers.processor import Decision
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
        autocast: "bf16" or None. (fp16 would need loss scaling; pipelines in fp16 train with "bf16".)
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
        if min(self.steps, self.batch, self.seeds, self.sampler_steps, self.every) < 1:
            raise ValueError("steps, batch, seeds, sampler_steps and every must be 1 or more")
        if self.autocast not in DTYPES:
            raise ValueError(f"unknown autocast {self.autocast!r}; known: {list(DTYPES)}")


DTYPES = {None: None, "bf16": torch.bfloat16}


@dataclass
class Lesson:
    """What there is to learn from: prompts per expert, composed prompts, and pictures if there are any."""

    singles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    composed: Sequence[str] = ()
    samples: Samples | None = None


def train_gates(
    pipe: Any, mixture: Mixture, lesson: Lesson, *, config: GateTraining, folder: str | Path | None = None
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
    check(mixture, lesson, config)
    run = Run(pipe, mixture, lesson, config, folder=Path(folder) if folder else None)
    run.memory = prepare(run)
    models = (pipe.unet, pipe.text_encoder)
    gates = {id(p) for p in mixture.parameters()}
    others = [p for model in models for p in model.parameters() if p.requires_grad and id(p) not in gates]
    for p in others:
        p.requires_grad_(False)
    for p in mixture.parameters():
        p.requires_grad_(True)
    try:
        return fit(run)
    finally:
        for p in others:
            p.requires_grad_(True)


@dataclass
class Run:
    """One training run: what is trained, how, on what, and where it is kept."""

    pipe: Any
    mixture: Mixture
    lesson: Lesson
    config: GateTraining
    folder: Path | None = None
    memory: Memory | None = None

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be gone on with."""
        experts = {n: [e.sha256, self.mixture.strength(n)] for n, e in self.mixture.experts.items()}
        prompts = {"singles": {k: list(v) for k, v in self.lesson.singles.items()}, "composed": list(self.lesson.composed)}
        return {**asdict(self.config), **prompts, "gates": self.mixture.config.to_dict(), "experts": experts}

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.config.autocast]
        return nullcontext() if dtype is None else torch.autocast(self.pipe.device.type, dtype)


def check(mixture: Mixture, lesson: Lesson, config: GateTraining) -> None:
    """Raise ValueError for a term without what it needs, or an expert that is not there."""
    for name in (*lesson.singles, *config.styles):
        mixture.strength(name)
    if config.single and not lesson.singles:
        raise ValueError("the single term needs prompts for each expert")
    if config.composed and not lesson.composed:
        raise ValueError("the composed term needs composed prompts")
    if config.denoise and lesson.samples is None:
        raise ValueError("the denoise term needs pictures")


def prepare(run: Run) -> Memory | None:
    """Sample the teachers' trajectories."""
    pipe, mixture, lesson, config = run.pipe, run.mixture, run.lesson, run.config
    options: dict[str, Any] = {"seeds": config.seeds, "steps": config.sampler_steps, "guidance": config.guidance}
    parts = []
    with run.autocast():
        if config.single:
            for i, (name, prompts) in enumerate(lesson.singles.items()):
                teach = single_teacher(pipe, mixture, name)
                parts.append(remember(pipe, teach, prompts, source="single", seed=config.seed + i, **options))
        if config.composed:
            teach = composed_teacher(pipe, mixture, config.styles)
            parts.append(remember(pipe, teach, lesson.composed, source="composed", seed=config.seed + 99, **options))
    return Memory.join(parts) if parts else None


def fit(run: Run) -> list[dict]:
    """The loop. Each update's randomness follows from the seed and its number, so that a resumed run is the same run."""
    config, parameters = run.config, run.mixture.parameters()
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=0.0)
    log = _resume(run, optimizer)
    bar = tqdm(range(len(log), config.steps), initial=len(log), total=config.steps, desc="gates", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        terms = _terms(run, torch.Generator().manual_seed(config.seed * 1_000_003 + step))
        loss = sum(getattr(config, name) * value for name, value in terms.items())
        values = {name: value.item() for name, value in terms.items()}
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is not finite at step {step}: {values}")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.append({"step": step, "loss": loss.item(), **values})
        bar.set_postfix({k: f"{v:.3f}" for k, v in log[-1].items() if k != "step"}, refresh=False)
        if (step + 1) % config.every == 0 or step + 1 == config.steps:
            _save(run, optimizer, log)
    return log


def _terms(run: Run, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Each active term, unweighted."""
    terms: dict[str, torch.Tensor] = {}
    decisions: list[Decision] = []
    with run.autocast(), run.mixture.listen(decisions.append):
        if run.memory is not None:
            terms |= _recovery_terms(run, run.memory, generator)
        if run.config.denoise and run.lesson.samples is not None:
            terms["denoise"] = denoising_loss(run.pipe, run.lesson.samples, generator, batch=run.config.batch)
    if run.config.balance:
        there = [torch.tensor(d.present, device=d.gates.device) for d in decisions]
        terms["balance"] = mixing.balance_loss([d.gates for d in decisions], there)
    return terms


def _recovery_terms(run: Run, memory: Memory, generator: torch.Generator) -> dict[str, torch.Tensor]:
    device = run.pipe.device
    pick = torch.randint(0, len(memory.x), (run.config.batch,), generator=generator)
    x, timesteps, targets, norms = (t[pick].to(device) for t in (memory.x, memory.timesteps, memory.targets, memory.norms))
    student = predict(run.pipe, x, timesteps, [memory.prompts[i] for i in pick.tolist()])
    terms = {}
    for source in ("single", "composed"):
        rows = [i for i, p in enumerate(pick.tolist()) if memory.sources[p] == source]
        if rows:
            terms[source] = recovery_error(student[rows], targets[rows], norms[rows])
    return terms


def _save(run: Run, optimizer: torch.optim.Optimizer, log: list[dict]) -> None:
    if run.folder is None:
        return
    run.mixture.save_pretrained(run.folder)
    gates = {part: bank.state_dict() for part, bank in run.mixture.banks.items()}
    state = {"optimizer": optimizer.state_dict(), "gates": gates, "log": log, "run": json.dumps(run.identity())}
    torch.save(state, run.folder / f"{STATE}.tmp")
    (run.folder / f"{STATE}.tmp").rename(run.folder / STATE)
    (run.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


def _resume(run: Run, optimizer: torch.optim.Optimizer) -> list[dict]:
    """The log so far, empty for a new run; gates and optimizer are set to where they stood."""
    if run.folder is None or not (run.folder / STATE).exists():
        return []
    state = torch.load(run.folder / STATE, weights_only=True)
    kept, asked = json.loads(state["run"]), json.loads(json.dumps(run.identity()))
    if changed := [k for k, v in asked.items() if kept.get(k) != v]:
        raise ValueError(f"{run.folder} holds a run with other settings ({', '.join(changed)}); use another folder")
    for part, gates in state["gates"].items():
        run.mixture.banks[part].load_state_dict(gates)
    optimizer.load_state_dict(state["optimizer"])
    return state["log"]
