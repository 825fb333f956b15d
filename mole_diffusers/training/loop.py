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
from mole_diffusers.gates import PromptGate
from mole_diffusers.mixture import Mixture
from mole_diffusers.processor import Decision
from mole_diffusers.training.clip import Clip
from mole_diffusers.training.data import Draw
from mole_diffusers.training.objectives import BALANCE, OBJECTIVES, Weighted, parse
from mole_diffusers.training.study import Lesson, Study, Term

STATE = "training.pt"


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained.

    Attributes:
        terms: objective -> weight, or {"weight": ..., "batch": ..., option: ...}; see `objectives.OBJECTIVES` for names and
            options. "balance" is MoLE's balance loss, its weight the paper's alpha (0.5 there), and MiLoRA's load-balance
            loss for "prompt" gates (0.01 there).
        steps, batch, lr: updates, rows per term and update, AdamW's rate (pooled gates need about 1e-2, flattened 1e-5).
        autocast: "bf16" or None. (fp16 would need loss scaling; pipelines in fp16 train with "bf16".)
        every: updates between checkpoints.
    """

    terms: Mapping[str, float | Mapping[str, Any]] = field(default_factory=lambda: {"single": 1.0, "composed": 1.0})
    steps: int = 150
    batch: int = 8
    lr: float = 1e-2
    seed: int = 0
    autocast: str | None = None
    every: int = 50

    def __post_init__(self) -> None:
        if not any(weighted.weight for name, weighted in self.parsed().items() if name != BALANCE):
            raise ValueError(f"at least one term of {list(OBJECTIVES)} needs a weight, got {dict(self.terms)}")
        if min(self.steps, self.batch, self.every) < 1:
            raise ValueError("steps, batch and every must be 1 or more")
        if self.autocast not in DTYPES:
            raise ValueError(f"unknown autocast {self.autocast!r}; known: {list(DTYPES)}")

    def parsed(self) -> dict[str, Weighted]:
        """The terms with a weight."""
        found = {name: parse(name, given) for name, given in self.terms.items()}
        return {name: weighted for name, weighted in found.items() if weighted.weight}


DTYPES = {None: None, "bf16": torch.bfloat16}


def train_gates(
    pipe: Any,
    mixture: Mixture,
    lesson: Lesson,
    *,
    config: GateTraining,
    clip: Clip | None = None,
    folder: str | Path | None = None,
) -> list[dict]:
    """Train the gates of an attached mixture; base and experts stay as they are.

    Args:
        clip: the CLIP of the terms that look at pictures.
        folder: checkpoints and `log.jsonl` go here; a run that was cut off goes on from its last checkpoint.

    Returns:
        One {"step", "loss", term: value} per update.

    Raises:
        ValueError: a term without what it needs, an unknown expert, a loss that is not finite (the last checkpoint stays).
    """
    if not mixture.parameters():
        raise ValueError(f"gates of family {mixture.config.family!r} have nothing to train")
    for name in (*lesson.singles, *lesson.others, *lesson.styles):
        mixture.strength(name)
    run = Run(Study(pipe, mixture, lesson, clip, config.seed), config, Path(folder) if folder else None)
    gates = {id(p) for p in mixture.parameters()}
    models = (pipe.unet, pipe.text_encoder, pipe.vae, *([clip.model] if clip else []))
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

    study: Study
    config: GateTraining
    folder: Path | None = None

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be gone on with."""
        mixture = self.study.mixture
        experts = {n: [e.sha256, mixture.strength(n)] for n, e in mixture.experts.items()}
        return {**asdict(self.config), **self.study.lesson.words(), "gates": mixture.config.to_dict(), "experts": experts}

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.config.autocast]
        return nullcontext() if dtype is None else torch.autocast(self.study.pipe.device.type, dtype)

    def prepare(self) -> dict[str, Term]:
        """Build every term: teachers sample their trajectories here."""
        with self.autocast():
            parsed = {name: w for name, w in self.config.parsed().items() if name != BALANCE}
            return {name: OBJECTIVES[name](self.study, **w.options) for name, w in parsed.items()}


def fit(run: Run) -> list[dict]:
    """The loop. Each update's randomness follows from the seed and its number, so that a resumed run is the same run."""
    config, parameters = run.config, run.study.mixture.parameters()
    weights, terms = config.parsed(), run.prepare()
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=0.0)
    log = _resume(run, optimizer)
    bar = tqdm(range(len(log), config.steps), initial=len(log), total=config.steps, desc="gates", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        found = _values(run, terms, torch.Generator().manual_seed(config.seed * 1_000_003 + step))
        loss = torch.stack([weights[name].weight * value for name, value in found.items()]).sum()
        values = {name: value.item() for name, value in found.items()}
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


def _values(run: Run, terms: Mapping[str, Term], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Each term, unweighted."""
    weights = run.config.parsed()
    decisions: list[Decision] = []
    with run.autocast(), run.study.mixture.listen(decisions.append):
        values = {name: term(Draw(generator, weights[name].batch or run.config.batch)) for name, term in terms.items()}
    if BALANCE in weights:
        live = [d for d in decisions if d.gates.requires_grad]  # not those of teachers
        values[BALANCE] = _balance(run.study.mixture, live)
    return values


def _balance(mixture: Mixture, live: Sequence[Decision]) -> torch.Tensor:
    """The family's own balance loss where it has one, MoLE's otherwise."""
    own = [g.balance_loss() for bank in mixture.banks.values() for g in bank.gates.values() if isinstance(g, PromptGate)]
    if own:
        return torch.stack(own).mean()
    there = [torch.tensor(d.present, device=d.gates.device) for d in live]
    return mixing.balance_loss([d.gates for d in live], there)


def _save(run: Run, optimizer: torch.optim.Optimizer, log: list[dict]) -> None:
    if run.folder is None:
        return
    run.study.mixture.save_pretrained(run.folder)
    gates = {part: bank.state_dict() for part, bank in run.study.mixture.banks.items()}
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
        run.study.mixture.banks[part].load_state_dict(gates)
    optimizer.load_state_dict(state["optimizer"])
    return state["log"]
