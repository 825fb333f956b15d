"""A run of gate training: what is trained, how, on what, where it is kept, and how processes act as one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from mole_diffusers import functional
from mole_diffusers.functional import onto
from mole_diffusers.gates import PromptGate, RankGate
from mole_diffusers.patching.runtime import Decision
from mole_diffusers.training.checkpoints import write
from mole_diffusers.training.config import PASSING, GateTraining
from mole_diffusers.training.data import Draw
from mole_diffusers.training.denoising import latent_shape, predict
from mole_diffusers.training.engine import Engine, restored
from mole_diffusers.training.objectives import BALANCE
from mole_diffusers.training.study import Study, Term

LOG = "log.jsonl"
Success = Callable[[Sequence[Image.Image], str], float]  # pictures of a prompt -> the share that is right


@dataclass
class Run:
    """One training run."""

    study: Study
    config: GateTraining
    folder: Path | None
    success: Success | None
    engine: Engine
    ema: EMAModel | None
    terms: dict[str, Term] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.study.mixture.parameters()

    @property
    def accelerator(self) -> Accelerator:
        return self.engine.accelerator

    @property
    def log(self) -> list[dict]:
        return self.engine.log

    def dropout(self, generator: torch.Generator) -> AbstractContextManager:
        """The mixture with the experts of one update."""
        mixture, drop = self.study.mixture, self.config.drop
        return mixture.only(*kept(list(mixture.experts), drop, generator)) if drop else nullcontext()

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be gone on with."""
        mixture, config = self.study.mixture, self.config.to_dict()
        experts = {n: [e.sha256, mixture.strength(n)] for n, e in mixture.experts.items()}
        kept = {name: value for name, value in config.items() if name not in PASSING}
        pictures = self.study.lesson.samples.captions if self.study.lesson.samples else None
        known = {"gates": mixture.config.to_dict(), "experts": experts, "pictures": pictures}
        return {**kept, **self.study.lesson.words(), **known}


@contextmanager
def only_gates_move(run: Run) -> Iterator[None]:
    """Gradients for the gates alone while the block runs; the pipeline is given back as it was."""
    pipe, clip = run.study.pipe, run.study.clip
    models = (pipe.unet, pipe.text_encoder, pipe.vae, *([clip.model] if clip else []))
    flags = {p: p.requires_grad for model in models for p in model.parameters()}
    gates, slow = {id(p) for p in run.parameters}, pipe.unet.is_gradient_checkpointing
    for p in flags:
        p.requires_grad_(id(p) in gates)
    if run.config.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        if run.config.checkpointing and not slow:
            pipe.unet.disable_gradient_checkpointing()


def values(run: Run, step: int, *, index: int, shares: int) -> dict[str, torch.Tensor]:
    """Each term, unweighted, on share `index` of the batch of update `step`."""
    generator = torch.Generator().manual_seed(run.config.seed * 1_000_003 + step)
    asked, decisions = run.config.parsed(), list[Decision]()
    found = {}
    with run.engine.autocast(), run.dropout(generator), run.study.mixture.listen(decisions.append):
        for name, term in run.terms.items():
            found[name] = term(Draw(generator, asked[name].batch or run.config.batch, index, shares))
    if BALANCE in asked:
        found[BALANCE] = _balance(run, [d for d in decisions if d.gates.requires_grad])  # not those of teachers
    return found


def kept(experts: Sequence[str], drop: float, generator: torch.Generator) -> list[str]:
    """The experts of one update: each sits out with chance `drop`, but one always stays (RAMoLE's expert dropout)."""
    draws = torch.rand(len(experts), generator=generator)
    return [name for name, draw in zip(experts, draws, strict=True) if draw >= drop or draw == draws.max()]


def _balance(run: Run, live: Sequence[Decision]) -> torch.Tensor:
    """The family's own balance loss where it has one, MoLE's otherwise."""
    gates = [gate for bank in run.study.mixture.banks.values() for gate in bank.gates.values()]
    if own := [gate.balance_loss(partial(_over_processes, run)) for gate in gates if isinstance(gate, PromptGate)]:
        return torch.stack(own).mean()
    there = onto(torch.tensor([d.present for d in live]), live[0].gates.device)  # [blocks, N]
    return functional.balance_loss(_over_processes(run, functional.mean_shares([d.gates for d in live], list(there))))


def _over_processes(run: Run, own: torch.Tensor) -> torch.Tensor:
    """The mean of `own` over processes, with the gradient of `own`: averaged gradients then are those of the mean."""
    if run.accelerator.num_processes == 1:
        return own
    return own + (run.accelerator.reduce(own.detach().clone(), "mean") - own.detach())


@contextmanager
def loads_counted(run: Run) -> Iterator[None]:
    """Have rank gates even out their loads after an update, once, over the rows of all its parts and processes."""
    gates = [g for bank in run.study.mixture.banks.values() for g in bank.gates.values() if isinstance(g, RankGate)]
    for gate in gates:
        gate.held = True
    try:
        yield
    finally:
        for gate in gates:
            gate.held = False
    for gate in gates:
        if gate.load is not None:
            gate.load = run.accelerator.reduce(gate.load)
        gate.rebalance()


def settle(run: Run) -> dict[str, float]:
    """Log the updates since the last look, and return the last row; see `Engine.settle`."""
    names = ["loss", *run.terms, *([BALANCE] if BALANCE in run.config.parsed() else [])]
    return run.engine.settle(names, lambda: _culprit(run))


@torch.no_grad()
def _culprit(run: Run) -> str:
    """Which expert alone already predicts what is not finite."""
    pipe, mixture, broken = run.study.pipe, run.study.mixture, []
    x = torch.randn(1, *latent_shape(pipe), generator=torch.Generator().manual_seed(0)).to(pipe.device)
    timestep = torch.tensor([500], device=pipe.device)
    for name in mixture.experts:
        with run.engine.autocast(), mixture.fixed({name: mixture.strength(name)}):
            if not torch.isfinite(predict(pipe, x, timestep, [name])).all():
                broken.append(name)
    if broken:
        return f"expert {' and '.join(map(repr, broken))} alone predicts what is not finite"
    return "every expert alone is finite: a lower lr or precision 'no' may help"


def save(run: Run, step: int) -> None:
    """Write checkpoint-`step`."""
    if run.folder is None:
        return
    kept: dict[str, Any] = send_to_device(run.study.kept, "cpu")  # another machine may lack this process's card
    if run.accelerator.num_processes > 1:
        kept = {name: value for part in gather_object([kept]) for name, value in part.items()}
    if run.accelerator.is_main_process:
        state = {name: part.state_dict() for name, part in _parts(run).items()}
        state |= {"log": run.log, "kept": kept, "run": json.dumps(run.identity())}
        write(run.folder, step, state, gates=run.study.mixture.save_pretrained, keep=run.config.keep)
        (run.folder / LOG).write_text("".join(json.dumps(row) + "\n" for row in run.log))
    run.accelerator.wait_for_everyone()


def resume(run: Run, asked: str | None) -> None:
    """Set everything to where a checkpoint left it; a new run is left as it is."""
    state = restored(run.folder, asked, parts=_parts(run), identity=run.identity())
    if state is not None:
        run.engine.log, run.study.kept = state["log"], send_to_device(state["kept"], run.study.pipe.device)
        if run.ema is not None:
            run.ema.to(run.study.pipe.device)
    run.engine.remember()


def _parts(run: Run) -> dict[str, Any]:
    """All that has a state of its own."""
    parts = run.engine.parts() | {f"gates of {part}": bank for part, bank in run.study.mixture.banks.items()}
    return parts | ({"ema": run.ema} if run.ema is not None else {})
