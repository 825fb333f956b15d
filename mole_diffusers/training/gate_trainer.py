"""Gate training: setup -> fit -> validate. Only the gates' parameters change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn

from mole_diffusers import functional
from mole_diffusers.functional import Routed
from mole_diffusers.gates import Gate
from mole_diffusers.inspection.compare import sample
from mole_diffusers.mixture import Mixture
from mole_diffusers.patching.gating.decision import Decision
from mole_diffusers.patching.undo import undoing
from mole_diffusers.training.clip import Clip
from mole_diffusers.training.config import BALANCE, GateTraining
from mole_diffusers.training.context import LossFn, TrainingContext, warn_of_missing_triggers
from mole_diffusers.training.data import RandomBatch, TrainingData
from mole_diffusers.training.denoising import predict
from mole_diffusers.training.engine import (
    Checkpoints,
    Engine,
    OnUpdate,
    adamw,
    check_batch,
    digest,
    join_processes,
    save_activation_memory,
)
from mole_diffusers.training.initialization import initialize
from mole_diffusers.training.networks import network
from mole_diffusers.training.objectives import OBJECTIVES
from mole_diffusers.whole_files import only_run

Success = Callable[[Sequence[Image.Image], str], float]  # pictures of a prompt -> the share that is right
TRACKERS: dict[str, dict] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}  # name -> how it expects pictures
MAY_CHANGE = ("every", "keep", "tracker", "validation")  # settings that a resumed run may change
REACH = 0.05  # how far one update may move a gate's logit


def train_gates(
    pipe: Any,
    mixture: Mixture,
    data: TrainingData,
    *,
    config: GateTraining,
    clip: Clip | None = None,
    folder: str | Path | None = None,
    resume_from: str | None = None,
    success: Success | None = None,
    report: OnUpdate | None = None,
    progress: bool = True,
) -> list[dict]:
    """Train the gates of an attached mixture; base and experts stay as they are.

    Under `accelerate launch` every process calls this with the same arguments and takes its share of each batch.

    Args:
        clip: for the objectives that need one.
        folder: checkpoints, `log.jsonl`, validation pictures and finally the gates are written here.
        resume_from: "latest" or "checkpoint-N" resumes there; "latest" without a checkpoint starts a new run, as does None.
        success: judges validation pictures; its mean over prompts is logged as "success".
        report: called with every update's row, after its checkpoint; an exception in it ends the run.
        progress: show progress bars.

    Returns:
        One {"step", "loss", term: value} per update.

    Raises:
        ValueError: the pipeline cannot be trained on, a term lacks what it needs, an expert is unknown, a size cannot be
            drawn, or a loss is not finite (the last checkpoint stays).
        OSError: a checkpoint cannot be written; earlier ones stay.
    """
    context = TrainingContext(pipe, mixture, data, clip, config, progress=progress)
    trainer = GateTrainer(context, folder=Path(folder) if folder else None, success=success)
    with only_run(trainer.engine.writes_to):
        if not trainer.engine.resume(resume_from):
            initialize(trainer.context, config.initial)
        with trainer.only_gates_learn():
            trainer.prepare()
            trainer.fit(report)
    return trainer.engine.log.rows


class GateTrainer:
    """One training run, in the order of its methods."""

    # ---- setup

    def __init__(self, context: TrainingContext, *, folder: Path | None = None, success: Success | None = None):
        """Check the settings and prepare updates. Under `accelerate launch` this joins the other processes."""
        config, mixture, data = context.config, context.mixture, context.data
        network(context.pipe)  # raises for a pipeline that cannot be trained on
        if not mixture.parameters():
            raise ValueError(f"gates of type {mixture.config.gate_type!r} have nothing to train")
        for name in (*data.singles, *data.others, *data.styles):
            mixture.strength(name)  # raises for an unknown expert
        if config.validation.every and not (config.validation.prompts or data.composed):
            raise ValueError("validation draws the composed prompts, and there are none: give some, or prompts of its own")
        _ = context.composed_shape  # raises for a size that cannot be drawn
        warn_of_missing_triggers(context)
        known = [name for name in map(str, get_available_trackers()) if name in TRACKERS]
        if config.tracker and config.tracker not in known:
            raise ValueError(f"the tracker {config.tracker!r} is not installed; installed: {known}")
        accelerator = join_processes(context.pipe.device, log_with=config.tracker, project_dir=folder)
        for name, term in config.parsed.items():
            check_batch(term.batch or config.batch, accelerator, config.accumulation, f"the {name} term's batch")
        self.context = replace(context, progress=context.progress and accelerator.is_main_process)
        self.success, self.loss_fns = success, dict[str, LossFn]()
        self.ema = EMAModel(mixture.parameters(), decay=config.ema) if config.ema else None
        optimizer = adamw(parameter_groups(self.gates, config.lr), context.pipe.device, weight_decay=config.weight_decay)
        schedule = get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
        stateful = {"kept": self.context, **{f"gates of {part}": bank for part, bank in mixture.parts.banks.items()}}
        stateful |= {"ema": self.ema} if self.ema else {}
        kept = Checkpoints(folder, identity(context), mixture.save_pretrained, stateful)
        self.engine = Engine(accelerator, optimizer, schedule, config, kept, self._diagnose, config.max_norm)

    @contextmanager
    def only_gates_learn(self) -> Iterator[None]:
        """Compute gradients only for the gates while the block runs; then restore the pipeline."""
        pipe, clip = self.context.pipe, self.context.clip
        models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        models += [clip.model] if clip else []
        gates = {id(p) for p in self.context.mixture.parameters()}
        with undoing() as undo, self.context.mixture.parts.shared.tokens.remembering():
            for p in {p for model in models for p in model.parameters()}:
                undo.callback(p.requires_grad_, p.requires_grad)
                p.requires_grad_(id(p) in gates)
            if self.context.config.checkpointing:
                save_activation_memory(network(pipe).model, undo)
            yield

    def prepare(self) -> None:
        """Make the loss of each term. This draws the teachers' pictures."""
        with self.engine.autocast():
            for name, term in self.context.config.parsed.items():
                if name != BALANCE:
                    self.loss_fns[name] = OBJECTIVES[name](self.context, term)

    # ---- fit

    def fit(self, report: OnUpdate | None = None) -> None:
        """Run the updates, set the gates to their final weights, save them, and close the trackers."""
        config, accelerator = self.context.config, self.engine.accelerator
        if config.tracker:
            accelerator.init_trackers("mole")
        how: dict[str, Any] = {"progress": self.context.progress, "every": config.validation.every}
        self.engine.fit(self.update, name="gates", report=report, validate=self.validate, **how)
        if self.ema is not None:
            self._set_gates(self.ema.shadow_params)
        if folder := self.engine.writes_to:
            self.context.mixture.save_pretrained(folder)
        for tracker in accelerator.trackers:
            tracker.finish()

    def update(self, step: int) -> None:
        """One step of the optimizer on the weighted sum of the terms, without waiting for the device."""
        self.engine.update(partial(self.losses, step))
        for gate in self.gates:
            gate.rebalance(self.engine.accelerator.reduce)
        if self.ema is not None:
            self.ema.step(self.context.mixture.parameters())

    def losses(self, step: int, *, index: int, shares: int) -> dict[str, torch.Tensor]:
        """Each term without its weight, and "loss", their weighted sum, on share `index` of `shares` of a batch."""
        generator, config, mixture = self.engine.generator(step), self.context.config, self.context.mixture
        terms, decisions = config.parsed, list[Decision]()
        dropout = (
            mixture.only(*drop_experts(list(mixture.experts), config.drop, generator)) if config.drop else nullcontext()
        )
        found = {}
        with ExitStack() as stack:
            routed = [stack.enter_context(g.noting_routes()) for g in self.gates] if BALANCE in terms else []
            with self.engine.autocast(), dropout, mixture.parts.listen(decisions.append):
                for name, loss in self.loss_fns.items():
                    found[name] = loss(RandomBatch(generator, terms[name].batch or config.batch, index, shares))
            if BALANCE in terms:
                live = [d for d in decisions if d.gates.requires_grad]  # without those of teachers
                found[BALANCE] = self._balance(live, routed)
        return {"loss": torch.stack([terms[name].weight * value for name, value in found.items()]).sum(), **found}

    def _balance(self, decisions: Sequence[Decision], routed: Sequence[Sequence[Routed]]) -> torch.Tensor:
        """MiLoRA's balance loss if gates have routed anything, otherwise MoLE's, among the experts that take part."""
        if own := [functional.load_balance(calls, self._over_processes) for calls in routed if calls]:
            return torch.stack(own).mean()
        shares = functional.relative_shares([d.gates for d in decisions], [d.mask for d in decisions])
        return functional.balance_loss(*self._over_processes(shares))

    def _over_processes(self, own: torch.Tensor) -> torch.Tensor:
        """The mean of `own` over processes, with the gradient of `own`; averaged gradients are then those of the mean."""
        accelerator = self.engine.accelerator
        if accelerator.num_processes == 1:
            return own
        return own + (accelerator.reduce(own.detach().clone(), "mean") - own.detach())

    @property
    def gates(self) -> list[Gate]:
        return [gate for bank in self.context.mixture.parts.banks.values() for gate in bank]

    @torch.no_grad()
    def _diagnose(self) -> str:
        """The experts that predict non-finite values even alone."""
        broken, pipe, mixture = [], self.context.pipe, self.context.mixture
        x = torch.randn(1, *self.context.composed_shape, generator=torch.Generator().manual_seed(0)).to(pipe.device)
        timestep = torch.tensor([500], device=pipe.device)
        for name in mixture.experts:
            with self.engine.autocast(), mixture.fixed({name: mixture.strength(name)}):
                if not torch.isfinite(predict(pipe, x, timestep, [name])).all():
                    broken.append(name)
        if broken:
            return f"expert {' and '.join(map(repr, broken))} alone predicts what is not finite"
        return "every expert alone is finite: a lower lr or precision 'no' may help"

    # ---- validate

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Draw the validation prompts from fixed noise; log the share that is right, save and track the pictures."""
        accelerator, config, pipe = self.engine.accelerator, self.context.config, self.context.pipe
        if not accelerator.is_main_process:
            return
        how, images, shares = config.validation, [], []
        call: dict[str, Any] = {"width": config.width, "height": config.height, "num_inference_steps": how.steps}
        call |= network(pipe).guided(how.guidance, how.seeds)
        for prompt in how.prompts or self.context.data.composed:
            with self._averaged(), self.engine.autocast():
                drawn = sample(pipe, prompt, range(config.seed, config.seed + how.seeds), **call)
            images += drawn
            shares += [self.success(drawn, prompt)] if self.success else []
        if shares:
            row = self.engine.log.rows[-1]
            row["success"] = sum(shares) / len(shares)
            accelerator.log({"success": row["success"]}, step=step - 1)
        if folder := self.engine.checkpoints.folder:
            path = folder / "validation" / f"step-{step}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            make_image_grid(images, len(images) // how.seeds, how.seeds).save(path)
        for tracker in accelerator.trackers:
            pixels = np.stack([np.asarray(image) for image in images])
            tracker.log_images({"validation": pixels}, step=step - 1, **TRACKERS[tracker.name])

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Use the gates' moving average instead of the gates, if there is one."""
        with ExitStack() as undo:
            if self.ema is not None:
                undo.callback(self._set_gates, [p.detach().clone() for p in self.context.mixture.parameters()])
                self._set_gates(self.ema.shadow_params)
            yield

    @torch.no_grad()
    def _set_gates(self, values: Iterable[torch.Tensor]) -> None:
        """Set all parameters. (EMAModel would do it through `parameter.data`, and gates would not notice, see `Derived`.)"""
        for parameter, value in zip(self.context.mixture.parameters(), values, strict=True):
            parameter.copy_(value)


def identity(context: TrainingContext) -> dict[str, Any]:
    """What must be the same for a run to resume."""
    mixture, clip = context.mixture, context.clip
    settings = {name: value for name, value in asdict(context.config).items() if name not in MAY_CHANGE}
    experts = {name: [expert.sha256, strength] for name, (expert, strength) in mixture.parts.weighed().items()}
    models = {"base": digest(context.pipe.components.values()), "clip": digest([clip.model]) if clip else None}
    return {**settings, **context.data.to_dict(), **models, "gates": mixture.config.to_dict(), "experts": experts}


def mean_losses(log: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means of the log's numbers over the first and over the last tenth of the updates; that of one update is mostly chance.

    The last also has the latest success in validation, if there was one.
    """
    names, count = [name for name in log[0] if name not in ("step", "success")], max(1, len(log) // 10)
    first, last = ({name: sum(row[name] for row in rows) / count for name in names} for rows in (log[:count], log[-count:]))
    return first, last | next(({"success": row["success"]} for row in reversed(log) if "success" in row), {})


def summary(config: GateTraining, log: Sequence[dict]) -> str:
    """How gates were trained and with what result, as a sentence or two for their model card."""
    terms = ", ".join(f"{name} (weight {term.weight:g})" for name, term in config.parsed.items())
    reached = ", ".join(f"{name} {value:.4g}" for name, value in mean_losses(log)[1].items())
    return f"Trained for {len(log)} updates on {terms}. Mean of the last tenth of them: {reached}."


def drop_experts(experts: Sequence[str], drop: float, generator: torch.Generator) -> list[str]:
    """The experts of one update: each sits out with chance `drop`, but one always stays (RAMoLE's expert dropout)."""
    draws = torch.rand(len(experts), generator=generator)
    return [name for name, draw in zip(experts, draws, strict=True) if draw >= drop or draw == draws.max()]


def parameter_groups(gates: Iterable[Gate], lr: float | None) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer. With `lr` None, one update moves the logits of any gate about equally far.

    Adam moves every entry by about the learning rate. So a logit over D features of length 1 moves by up to rate *
    sqrt(D): the right rate for one number per expert is too high for a vector of 320, and far too high for a flattened
    state of a million. Therefore a matrix over features gets 0.05 / sqrt(D). Parameters that read raw states, where each
    of the D entries has size 1 instead of the whole vector, get 0.05 / D. All others get 0.05.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for gate in gates:
        for name, parameter in gate.named_parameters():
            rate = REACH / gate.sensitivity().get(name, 1) if lr is None else lr
            groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
