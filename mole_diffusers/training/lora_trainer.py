"""Concept LoRAs: one low-rank adapter on UNet and text encoder, trained from pictures. setup -> fit."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mole_diffusers.lora.writing import save_atomically
from mole_diffusers.patching.undo import Undo, undoing
from mole_diffusers.safe_files import read_safetensors
from mole_diffusers.training.beam import Beams
from mole_diffusers.training.config import LoraTraining
from mole_diffusers.training.data import RandomBatch, Samples
from mole_diffusers.training.denoising import denoising_loss, sample_latents
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
from mole_diffusers.training.latents import latent_shape
from mole_diffusers.training.lora_adapter import add_lora, save_lora
from mole_diffusers.training.networks import unet_of
from mole_diffusers.whole_files import only_run

PRIOR_FILE = "prior.safetensors"
MAY_CHANGE = ("every", "keep", "accumulation", "checkpointing")  # settings that a resumed run may change


def train_lora(
    pipe: Any,
    samples: Samples,
    config: LoraTraining,
    *,
    prior: Samples | None = None,
    name: str = "the concept",
    folder: str | Path | None = None,
    resume_from: str | None = None,
    report: OnUpdate | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Train a LoRA for one concept. Afterwards the pipeline is as it was.

    Under `accelerate launch` every process calls this with the same arguments and takes its share of each batch.

    Args:
        prior: pictures of the concept's class, see `class_samples`.
        name: shown next to the progress bar, and in error messages.
        folder: checkpoints and `log.jsonl` are written here.
        resume_from: "latest" or "checkpoint-N" resumes there; "latest" without a checkpoint starts a new run, as does None.
        report: called with every update's row, after its checkpoint; an exception in it ends the run.
        progress: show a progress bar.

    Returns:
        Diffusers' keys -> fp32 tensors, such as "unet.<layer>.lora_A.weight"; `save_lora` writes them.

    Raises:
        ValueError: a pipeline that cannot be trained on, or a loss that is not finite (the last checkpoint stays).
        OSError: a checkpoint cannot be written; earlier ones stay.
    """
    pictures = {"concept": samples} | ({"prior": prior} if prior is not None else {})
    with undoing() as undo:
        trainer = LoraTrainer(pipe, pictures, config, undo, name=name, folder=Path(folder) if folder else None)
        if config.checkpointing:
            save_activation_memory(pipe.unet, undo)
        with only_run(trainer.engine.writes_to):
            trainer.engine.resume(resume_from)
            trainer.engine.fit(trainer.update, name=name, report=report, progress=progress)
            return trainer.lora.tensors()


class LoraTrainer:
    """One training run, in the order of its methods."""

    def __init__(
        self,
        pipe: Any,
        pictures: dict[str, Samples],
        config: LoraTraining,
        undo: Undo,
        *,
        name: str = "the concept",
        folder: Path | None = None,
    ):
        """Put the LoRA on the pipeline and prepare updates. Under `accelerate launch` this joins the other processes.

        Args:
            pictures: those of the "concept", and of the "prior" if there are any.
            undo: takes the LoRA off again.
        """
        unet_of(pipe, "training a LoRA")
        self.pipe, self.pictures, self.config = pipe, pictures, config
        accelerator = join_processes(pipe.device)
        check_batch(config.batch, accelerator, config.accumulation, "the batch")
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(config.seed)
            self.lora = add_lora(pipe, config, undo)
        optimizer = adamw(self.lora.groups(config.rates), pipe.device)
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.55 + 0.45 * math.cos(math.pi * i / config.steps))
        advice = f"{name}: a lower rate or no half precision may help"
        self.beams = Beams(self.lora.ranks(), optimizer, config) if config.beam else None
        stateful = {"lora": self.lora} | ({"past": self.beams} if self.beams else {})
        kept = Checkpoints(folder, self._identity(), self._save_weights, stateful)
        self.engine = Engine(accelerator, optimizer, cosine, config, kept, lambda: advice)

    def update(self, step: int) -> None:
        """One step of the optimizer, and of the competition among ranks."""
        self.engine.update(partial(self.losses, step))
        if self.beams is not None:
            self.beams.after(step + 1)

    def losses(self, step: int, *, index: int, shares: int) -> dict[str, torch.Tensor]:
        """Each kind of pictures, and "loss", their weighted sum, on share `index` of `shares` of a batch."""
        batch = RandomBatch(self.engine.generator(step), self.config.batch, index, shares)
        with self.engine.autocast():
            found = {name: denoising_loss(self.pipe, samples, batch) for name, samples in self.pictures.items()}
        loss = found["concept"] + self.config.prior * found["prior"] if "prior" in found else found["concept"]
        return {"loss": loss, **found}

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to resume."""
        settings = {n: str(v) for n, v in asdict(self.config).items() if n not in MAY_CHANGE}
        pictures = {f"{name} pictures": samples.identity for name, samples in self.pictures.items()}
        return settings | {"base": digest(self.pipe.components.values()), "prior pictures": None} | pictures

    def _save_weights(self, folder: Path) -> None:
        save_lora(self.lora.tensors(), folder / "lora.safetensors", alpha=self.config.alpha, dtype=torch.float32)


# ---- prior preservation


@torch.no_grad()
def class_samples(
    pipe: Any,
    prompt: str,
    *,
    count: int = 64,
    steps: int = 25,
    guidance: float = 7.5,
    seed: int = 0,
    batch: int = 4,
    folder: Path | None = None,
    progress: bool = True,
) -> Samples:
    """Pictures of a concept's class, drawn by the base, for DreamBooth's prior preservation (Ruiz et al., 2023).

    Args:
        prompt: of the class: "a photo of a dog".
        count: number of pictures; they are latents and never decoded.
        steps, guidance: of the sampler.
        batch: pictures at a time.
        folder: where they are saved, and found again when a run on the same base resumes.
        progress: show a progress bar.

    Raises ValueError for a count, or steps, below 1, and for a file of saved pictures that is damaged.
    """
    if min(count, steps) < 1:
        raise ValueError(f"class pictures need a count and steps of 1 or more, got {count} and {steps}")
    shape, base = latent_shape(pipe), digest(pipe.components.values())
    file, asked = folder / PRIOR_FILE if folder else None, json.dumps([prompt, count, steps, guidance, seed, *shape, base])
    if file is not None and file.exists():
        saved = read_safetensors(file)
        if saved.metadata.get("asked") == asked:
            return Samples(saved.tensors["latents"], [prompt] * count, asked)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *shape, generator=generator)  # [count, C, H, W]
    drawn = [
        sample_latents(pipe, rows.to(pipe.device), [prompt] * len(rows), steps=steps, guidance=guidance).cpu()
        for rows in tqdm(noise.split(batch), desc="class pictures", disable=not progress)
    ]
    samples = Samples(torch.cat(drawn), [prompt] * count, asked)
    if file is not None:
        save_atomically({"latents": samples.latents}, file, {"asked": asked})
    return samples
