"""Concept LoRAs: one low-rank adapter on UNet and text encoder, trained from pictures. setup -> train_lora -> fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mole_diffusers.training.beam import LEAST, Beams
from mole_diffusers.training.checkpoints import write
from mole_diffusers.training.data import Draw, Samples
from mole_diffusers.training.denoising import denoising_loss
from mole_diffusers.training.engine import Engine, adamw, joined, restored
from mole_diffusers.training.lora_layers import LAYERS, LoraLayers, lora_layers
from mole_diffusers.training.lora_saving import save_kohya, save_lora

__all__ = ["ConceptConfig", "save_kohya", "save_lora", "train_lora"]
LOOK = 10  # updates between looks at the loss: each waits for the device
LOG = "log.jsonl"
PASSING = ("every", "keep", "accumulation", "checkpointing")  # what a run may change when it goes on


@dataclass(frozen=True)
class ConceptConfig:
    """How one concept is taught.

    Attributes:
        rank: rank of every layer, 1 or more.
        alpha: the scale is alpha / rank.
        layers: which of "attention", "feed-forward", "convolution".
        steps: updates.
        batch: pictures per update, over all processes and accumulated parts together; as many of the class beside them.
        lr: AdamW's peak rate; cosine down to a tenth.
        text_lr: the same for the text encoder; 0 leaves it out.
        seed: of every random choice.
        autocast: dtype of the forward pass, float16 with loss scaling; None computes in the model's own.
        prior: weight of the loss on pictures of the class (DreamBooth's prior preservation), where there are any.
        beam: let ranks compete (BeamLoRA); needs a rank of 8 or more.
        accumulation: parts that a batch is computed in, for less memory.
        checkpointing: compute activations again in the backward pass, for less memory and more time.
        every, keep: updates between checkpoints, and how many are kept.
    """

    rank: int = 8
    alpha: float = 8.0
    layers: tuple[str, ...] = ("attention",)
    steps: int = 300
    batch: int = 16
    lr: float = 1e-3
    text_lr: float = 5e-4
    seed: int = 0
    autocast: torch.dtype | None = None
    prior: float = 1.0
    beam: bool = False
    accumulation: int = 1
    checkpointing: bool = False
    every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        counts = ("rank", "steps", "batch", "accumulation", "every", "keep")
        if small := [name for name in counts if getattr(self, name) < 1]:
            raise ValueError(f"{small[0]} must be 1 or more, got {getattr(self, small[0])}")
        if not self.layers or (unknown := set(self.layers) - set(LAYERS)):
            raise ValueError(f"unknown layers {sorted(unknown) if self.layers else []}; known: {list(LAYERS)}")
        if self.beam and self.rank < LEAST:
            raise ValueError(f"ranks that compete need a rank of {LEAST} or more, got {self.rank}")

    @property
    def parts(self) -> dict[str, float]:
        """Part of the pipeline -> its rate, of those that learn."""
        return {part: lr for part, lr in (("unet", self.lr), ("text_encoder", self.text_lr)) if lr}

    @property
    def tau(self) -> float:
        """BeamLoRA's temperature for this rate."""
        return 0.05 if self.lr >= 1e-4 else 0.03


@dataclass
class ConceptRun:
    """One training run."""

    pipe: Any
    config: ConceptConfig
    pictures: dict[str, Samples]  # "concept", and "prior" where pictures of the class are given
    lora: LoraLayers
    engine: Engine
    beams: Beams | None
    folder: Path | None

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be gone on with."""
        settings = {n: str(v) for n, v in asdict(self.config).items() if n not in PASSING}
        return settings | {f"{name} pictures": samples.captions for name, samples in self.pictures.items()}


def setup(
    pipe: Any, pictures: dict[str, Samples], config: ConceptConfig, undo: ExitStack, *, folder: Path | None
) -> ConceptRun:
    """Put the LoRA on the pipeline and make what an update needs. Under `accelerate launch` this joins the others."""
    if getattr(pipe, "unet", None) is None or getattr(pipe, "text_encoder_2", None) is not None:
        raise ValueError(f"{type(pipe).__name__} cannot be trained on: it needs a unet and one text encoder")
    accelerator = joined(pipe.device)
    options: dict[str, Any] = {
        "layers": config.layers,
        "rank": config.rank,
        "alpha": config.alpha,
        "tau": config.tau,
        "beam": config.beam,
    }
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(config.seed)
        lora = lora_layers(pipe, list(config.parts), undo, **options)
    optimizer = adamw([group for part, lr in config.parts.items() for group in _groups(lora, part, lr)], pipe.device)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.55 + 0.45 * math.cos(math.pi * i / config.steps))
    engine = Engine(accelerator, optimizer, cosine, config.autocast, config.accumulation)
    engine.check_batch(config.batch, "the batch")
    beams = Beams(lora.ranks(), optimizer, config.steps, config.seed, config.tau) if config.beam else None
    return ConceptRun(pipe, config, pictures, lora, engine, beams, folder)


def _groups(lora: LoraLayers, part: str, lr: float) -> list[dict[str, Any]]:
    logits = [g for name, g in lora.logits.items() if name.startswith(f"{part}.")]
    groups = [{"params": lora.weights(part), "lr": lr, "weight_decay": 1e-2}]
    return groups + ([{"params": logits, "lr": lr, "weight_decay": 0.0}] if logits else [])


def train_lora(
    pipe: Any,
    samples: Samples,
    config: ConceptConfig,
    *,
    prior: Samples | None = None,
    init: Mapping[str, torch.Tensor] | None = None,
    name: str = "",
    folder: str | Path | None = None,
    resume_from: str | None = None,
    report: Callable[[dict], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Train a LoRA on `samples`; the pipeline is given back as it was.

    Under `accelerate launch` every process calls this with the same arguments and takes its share of each batch.

    Args:
        prior: pictures of the concept's class, see `prior.class_samples`, on which the base is to stay as it is.
        init: tensors of an earlier LoRA to start from, of the same layers and rank.
        name: shown beside the progress bar.
        folder: checkpoints, each with the LoRA so far, and `log.jsonl` go here.
        resume_from: "latest" or "checkpoint-N" goes on from there, "latest" of nothing starts anew; None starts anew.
        report: called with every update's row {"step", "loss", term: value}; what it raises ends the run.

    Returns:
        Tensors with diffusers' keys ("unet.<layer>.lora_A.weight", ...), for `save_lora`.

    Raises:
        ValueError: a pipeline that cannot be trained on, a loss that is not finite (the last checkpoint stays).
        OSError: a checkpoint cannot be written; earlier ones stay.
    """
    pictures = {"concept": samples} | ({"prior": prior} if prior is not None else {})
    with ExitStack() as undo:
        run = setup(pipe, pictures, config, undo, folder=Path(folder) if folder else None)
        undo.enter_context(_checkpointing(pipe, config.checkpointing))
        if init is not None:
            run.lora.load(init)
        resume(run, resume_from)
        fit(run, name=name, report=report)
        return run.lora.tensors()


def fit(run: ConceptRun, *, name: str = "", report: Callable[[dict], None] | None = None) -> None:
    """The loop. Each update's randomness follows from the seed and its number, so that a resumed run is the same run."""
    config, engine = run.config, run.engine
    start = reported = len(engine.log)
    quiet = not engine.accelerator.is_main_process
    bar = tqdm(initial=start, total=config.steps, desc=name or "concept", disable=quiet, mininterval=1)
    for step in range(start, config.steps):
        engine.update(partial(_numbers, run, step))
        done = step + 1
        if run.beams is not None:
            run.beams.after(done)
        keep = done == config.steps or done % config.every == 0
        if keep or done % LOOK == 0:
            row = engine.settle(
                ["loss", *run.pictures], lambda: f"{name or 'the concept'}: a lower rate or no half precision may help"
            )
            bar.set_postfix({k: f"{v:.4f}" for k, v in row.items() if k != "step"}, refresh=False)
        if keep:
            save(run, done)
        for row in engine.log[reported:]:
            if report is not None:
                report(row)
        reported = len(engine.log)
        bar.update()
    bar.close()


def _numbers(run: ConceptRun, step: int, index: int, shares: int) -> torch.Tensor:
    """[loss, concept, prior] on share `index` of the batch of update `step`."""
    generator = torch.Generator().manual_seed(run.config.seed * 1_000_003 + step)
    draws = [Draw(generator, run.config.batch, index, shares) for _ in run.pictures]
    with run.engine.autocast():
        found = [denoising_loss(run.pipe, p, d) for p, d in zip(run.pictures.values(), draws, strict=True)]
    loss = found[0] + run.config.prior * found[1] if len(found) > 1 else found[0]
    return torch.stack([loss, *found])


@contextmanager
def _checkpointing(pipe: Any, wanted: bool) -> Iterator[None]:
    if not wanted or pipe.unet.is_gradient_checkpointing:
        yield
        return
    pipe.unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        pipe.unet.disable_gradient_checkpointing()


def save(run: ConceptRun, step: int) -> None:
    """Write checkpoint-`step` with the LoRA as it is now."""
    if run.folder is None:
        return
    if run.engine.accelerator.is_main_process:
        tensors, config = run.lora.tensors(), run.config
        state = {name: part.state_dict() for name, part in _parts(run).items()}
        state |= {"log": run.engine.log, "past": run.beams.past if run.beams else {}, "run": json.dumps(run.identity())}

        def lora(path: Path) -> None:
            save_lora(tensors, path / "lora.safetensors", alpha=config.alpha, rank=config.rank)

        write(run.folder, step, state, gates=lora, keep=config.keep)
        (run.folder / LOG).write_text("".join(json.dumps(row) + "\n" for row in run.engine.log))
    run.engine.accelerator.wait_for_everyone()


def resume(run: ConceptRun, asked: str | None) -> None:
    """Set everything to where a checkpoint left it; a new run is left as it is."""
    state = restored(run.folder, asked, parts=_parts(run), identity=run.identity())
    if state is not None:
        run.engine.log = state["log"]
        if run.beams is not None:
            run.beams.past = state["past"]
    run.engine.remember()


def _parts(run: ConceptRun) -> dict[str, Any]:
    return run.engine.parts() | {"lora": run.lora}
