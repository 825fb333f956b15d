"""Gate training: setup -> train_gates -> fit -> validate. Only the gates' parameters move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm import tqdm

from mole_diffusers.mixture import Mixture
from mole_diffusers.training.clip import Clip
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.engine import DTYPES, Engine, adamw, joined
from mole_diffusers.training.objectives import BALANCE, OBJECTIVES
from mole_diffusers.training.rates import rates
from mole_diffusers.training.run import Run, Success, loads_counted, only_gates_move, resume, save, settle, values
from mole_diffusers.training.starts import begin
from mole_diffusers.training.study import Lesson, Study, warn_of_missing_triggers

LOOK = 10  # updates between looks at the loss: each waits for the device


def setup(study: Study, config: GateTraining, *, folder: Path | None, success: Success | None) -> Run:
    """Check what was asked, and make what an update needs. Under `accelerate launch` this joins the other processes."""
    mixture, lesson, device = study.mixture, study.lesson, study.pipe.device
    if not mixture.parameters():
        raise ValueError(f"gates of family {mixture.config.family!r} have nothing to train")
    for name in (*lesson.singles, *lesson.others, *lesson.styles):
        mixture.strength(name)
    warn_of_missing_triggers(study)
    begin(study, config.initial)
    if config.tracker and config.tracker not in (known := [t for t in map(str, get_available_trackers()) if t in PICTURES]):
        raise ValueError(f"the tracker {config.tracker!r} is not installed; installed: {known}")
    accelerator = joined(device, log_with=config.tracker, project_dir=folder)
    optimizer = adamw(rates(mixture.banks.values(), config.lr), device, weight_decay=config.weight_decay)
    schedule = get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
    dtype = DTYPES.get(config.precision)
    engine = Engine(accelerator, optimizer, schedule, dtype, config.accumulation, config.max_norm)
    for name, weighted in config.parsed().items():
        engine.check_batch(weighted.batch or config.batch, f"the {name} term's batch")
    ema = EMAModel(mixture.parameters(), decay=config.ema) if config.ema else None
    return Run(study, config, folder, success, engine, ema)


def train_gates(
    pipe: Any,
    mixture: Mixture,
    lesson: Lesson,
    *,
    config: GateTraining,
    clip: Clip | None = None,
    folder: str | Path | None = None,
    resume_from: str | None = None,
    success: Success | None = None,
    report: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train the gates of an attached mixture; base and experts stay as they are.

    Under `accelerate launch` every process calls this with the same arguments and takes its share of each batch.

    Args:
        clip: the CLIP of the terms that look at pictures.
        folder: checkpoints, `log.jsonl`, validation pictures and in the end the gates go here.
        resume_from: "latest" or "checkpoint-N" goes on from there, "latest" of nothing starts anew; None starts anew.
        success: judges validation pictures; its mean over prompts is logged as "success".
        report: called with every update's row, after its checkpoint; what it raises ends the run.

    Returns:
        One {"step", "loss", term: value} per update.

    Raises:
        ValueError: a term without what it needs, an unknown expert, a loss that is not finite (the last checkpoint stays).
        OSError: a checkpoint cannot be written; earlier ones stay.
    """
    study = Study(pipe, mixture, lesson, clip, config.seed)
    run = setup(study, config, folder=Path(folder) if folder else None, success=success)
    with only_gates_move(run):
        resume(run, resume_from)
        with run.engine.autocast():
            asked = {name: weighted for name, weighted in config.parsed().items() if name != BALANCE}
            run.terms = {name: OBJECTIVES[name](study, **weighted.options) for name, weighted in asked.items()}
        fit(run, report)
    return run.log


def fit(run: Run, report: Callable[[dict], None] | None = None) -> None:
    """The loop. Each update's randomness follows from the seed and its number, so that a resumed run is the same run."""
    config, start, looks = run.config, len(run.log), run.config.validation.every
    reported = start
    if config.tracker:
        run.accelerator.init_trackers("mole")
    bar = tqdm(initial=start, total=config.steps, desc="gates", disable=not run.accelerator.is_main_process, mininterval=1)
    for step in range(start, config.steps):
        update(run, step)
        done = step + 1
        last = done == config.steps
        keep, look = last or done % config.every == 0, bool(looks) and (last or done % looks == 0)
        if keep or look or done % LOOK == 0:
            bar.set_postfix({k: f"{v:.3f}" for k, v in settle(run).items() if k != "step"}, refresh=False)
        if look:
            validate(run, done)
        if keep:
            save(run, done)
        for row in run.log[reported:]:
            if report is not None:
                report(row)
        reported = len(run.log)
        bar.update()
    bar.close()
    finish(run)


def update(run: Run, step: int) -> None:
    """One step of the optimizer on the weighted sum of the terms, without waiting for the device."""
    asked = run.config.parsed()

    def part(index: int, shares: int) -> torch.Tensor:
        found = values(run, step, index=index, shares=shares)
        return torch.stack([torch.stack([asked[name].weight * v for name, v in found.items()]).sum(), *found.values()])

    with loads_counted(run):
        run.engine.update(part)
    if run.ema is not None:
        run.ema.step(run.parameters)


@torch.no_grad()
def validate(run: Run, step: int) -> None:
    """Draw the validation prompts with fixed noise; log how many are right, keep and track the pictures."""
    if not run.accelerator.is_main_process:
        return
    looks, images, shares = run.config.validation, [], []
    for prompt in looks.prompts or run.study.lesson.composed:
        noise = [torch.Generator().manual_seed(run.config.seed + i) for i in range(looks.seeds)]
        with _averaged(run), run.engine.autocast():
            drawn = run.study.pipe(
                [prompt] * looks.seeds, generator=noise, num_inference_steps=looks.steps, guidance_scale=looks.guidance
            ).images
        images += drawn
        shares += [run.success(drawn, prompt)] if run.success else []
    if shares:
        run.log[-1]["success"] = sum(shares) / len(shares)
        run.accelerator.log({"success": run.log[-1]["success"]}, step=step - 1)
    if run.folder:
        path = run.folder / "validation" / f"step-{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image_grid(images, len(images) // looks.seeds, looks.seeds).save(path)
    for tracker in run.accelerator.trackers:
        tracker.log_images(
            {"validation": np.stack([np.asarray(i) for i in images])}, step=step - 1, **PICTURES[tracker.name]
        )


PICTURES: dict[str, dict] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}


@contextmanager
def _averaged(run: Run) -> Iterator[None]:
    """The gates' running mean in their place, where one is kept."""
    if run.ema is None:
        yield
        return
    run.ema.store(run.parameters)
    run.ema.copy_to(run.parameters)
    try:
        yield
    finally:
        run.ema.restore(run.parameters)


def finish(run: Run) -> None:
    """Leave the gates as they are used, and saved, and close the trackers."""
    if run.ema is not None:
        run.ema.copy_to(run.parameters)
    if run.folder and run.accelerator.is_main_process:
        run.study.mixture.save_pretrained(run.folder)
    for tracker in run.accelerator.trackers:
        tracker.finish()
