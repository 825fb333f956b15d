"""What both trainings share: the loop, an update over processes and accumulated parts, its log, checkpoints of all state.

An update never waits for the device: its numbers stay there until `Engine.read_log`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import send_to_device
from torch import nn
from tqdm import tqdm

from mole_diffusers.patching.install.component import BANK
from mole_diffusers.patching.undo import Undo
from mole_diffusers.training.config import Updates
from mole_diffusers.whole_files import new_folder, write_text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precision -> dtype of autocast
READ_EVERY = 10  # updates between reading their numbers, which waits for the device
STATE = "training.pt"
LOG = "log.jsonl"
LATEST = "latest"
Losses = Callable[..., dict[str, torch.Tensor]]  # (index, shares) -> {"loss": ..., term: ...} of a share of a batch
OnUpdate = Callable[[dict], None]  # gets every update's row; an exception in it ends the run


@dataclass
class UpdateLog:
    """The numbers of updates, which stay on the device until they are read.

    Attributes:
        rows: {"step", name: number} of each update, as far as they were read.
        names: of the numbers of an update.
        pending: the numbers of updates that were not read yet.
    """

    rows: list[dict] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    pending: list[torch.Tensor] = field(default_factory=list)

    def add(self, parts: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Note the numbers of an update: their means over its parts."""
        self.names = list(parts[0])
        self.pending.append(torch.stack([torch.stack(list(part.values())) for part in parts]).mean(0))

    def read(self, accelerator: Accelerator) -> list[dict]:
        """The rows of the pending updates, means over processes. This waits for the device."""
        found = accelerator.reduce(torch.stack(self.pending), "mean").tolist() if self.pending else []
        self.pending.clear()
        return [{"step": step} | dict(zip(self.names, row, strict=True)) for step, row in enumerate(found, len(self.rows))]


@dataclass
class Checkpoints:
    """The folder of a run, with checkpoints of all its state.

    Attributes:
        folder: of the checkpoints and the log; None writes none.
        identity: what must be the same for a run to resume, ready for JSON.
        save_weights: writes the trained weights into a folder.
        stateful: name -> everything else with a `state_dict` that a checkpoint must hold.
    """

    folder: Path | None
    identity: dict[str, Any]
    save_weights: Callable[[Path], None]
    stateful: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path | None, step: int, rows: Sequence[dict], *, keep: int) -> None:
        """Write checkpoint-`step` and the log. Every process calls this, since some state is gathered from all.

        All but the last `keep` up to here are deleted. Later ones stay: they are of a run that was resumed before them.

        Args:
            folder: None in a process that does not write.

        Raises OSError if it cannot be written, for example because the disk is full; earlier checkpoints stay.
        """
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.stateful.items()}
        if folder is None:
            return
        path = folder / f"checkpoint-{step}"
        try:
            with new_folder(path) as part:
                self.save_weights(part)
                torch.save(state | {"log": list(rows), "run": json.dumps(self.identity)}, part / STATE)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
            whole = [p.name for p in checkpoints(folder)]
            raise OSError(f"{path} cannot be written: {error}; whole checkpoints: {whole}") from error
        for old in [p for p in checkpoints(folder) if _number(p) <= step][:-keep]:
            shutil.rmtree(old)
        write_text(folder / LOG, "".join(json.dumps(row) + "\n" for row in rows))

    def restore(self, asked: str | None, device: torch.device) -> list[dict] | None:
        """Restore everything from a checkpoint, on this device. Returns the log; None for a new run.

        Raises ValueError for a checkpoint of a run with another `identity`, without a folder, and like `find_checkpoint`.
        """
        if self.folder is None and asked is not None:
            raise ValueError(f"a run that resumes {asked!r} needs the folder of its checkpoints")
        path = find_checkpoint(self.folder, asked) if self.folder else None
        if path is None:
            return None
        state = _read_state(path / STATE)
        before, now = state["run"], json.loads(json.dumps(self.identity))
        if changed := [name for name, value in now.items() if before.get(name) != value]:
            raise ValueError(f"{path} is of a run with other settings ({', '.join(changed)}); use another folder")
        if missing := sorted({*self.stateful, "log"} - set(state)):
            raise ValueError(f"{path / STATE} is damaged: it has no {missing[0]}; resume from another checkpoint")
        for name, part in self.stateful.items():
            is_optimizer = isinstance(part, torch.optim.Optimizer)  # it keeps its counters where it reads them
            part.load_state_dict(state[name] if is_optimizer else send_to_device(state[name], device))
        return state["log"]


@dataclass
class Engine:
    """The optimizer and everything around it.

    Attributes:
        diagnose: a text to add to the error if a loss is not finite.
        max_norm: the length that gradients are clipped to; 0 does not clip.
        good: the parameters when they were last known to be finite.
    """

    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    schedule: Any
    config: Updates
    checkpoints: Checkpoints
    diagnose: Callable[[], str]
    max_norm: float = 1.0
    log: UpdateLog = field(default_factory=UpdateLog)
    good: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "fp16")
        own = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        self.checkpoints.stateful |= own

    @property
    def device(self) -> torch.device:
        """The device of the parameters. (An Accelerator's own device is that of the first run in its process.)"""
        return self.parameters[0].device

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def generator(self, step: int) -> torch.Generator:
        """For an update's random choices. They follow from the seed and the update's number, so resuming changes nothing."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES.get(self.config.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    @property
    def writes_to(self) -> Path | None:
        """The folder that this process writes to; only one of several processes writes."""
        return self.checkpoints.folder if self.accelerator.is_main_process else None

    # ---- the loop

    def fit(
        self,
        update: Callable[[int], None],
        *,
        name: str,
        report: OnUpdate | None = None,
        progress: bool = True,
        validate: Callable[[int], None] | None = None,
        every: int = 0,
    ) -> None:
        """Run the remaining updates, with a checkpoint every so often and at the end.

        Args:
            update: makes an update, counted from 0, through `Engine.update`.
            name: next to the progress bar.
            validate: called every `every` updates, and after the last one, before its checkpoint.
        """
        self._mark_good()
        last, reported = self.config.steps, len(self.log.rows)
        hidden = not (progress and self.accelerator.is_main_process)
        bar = tqdm(initial=reported, total=last, desc=name, disable=hidden, mininterval=1)
        for done in range(reported + 1, last + 1):
            update(done - 1)
            saves = done == last or done % self.config.every == 0
            validates = bool(every) and (done == last or done % every == 0)
            if saves or validates or done % READ_EVERY == 0:
                numbers = self.read_log()
                bar.set_postfix({k: f"{v:.4f}" for k, v in numbers.items() if k != "step"}, refresh=False)
            if validate is not None and validates:
                validate(done)
            if saves:
                self.checkpoints.write(self.writes_to, done, self.log.rows, keep=self.config.keep)
                self.accelerator.wait_for_everyone()
            for row in self.log.rows[reported:]:
                if report is not None:
                    report(row)
            reported = len(self.log.rows)
            bar.update()
        bar.close()

    # ---- one update, and its numbers

    def update(self, losses: Losses) -> None:
        """One step of the optimizer, without waiting for the device."""
        totals, parts, processes = list[dict[str, torch.Tensor]](), self.config.accumulation, self.accelerator.num_processes
        for i in range(parts):
            found = losses(index=i * processes + self.accelerator.process_index, shares=parts * processes)
            self.scaler.scale(found["loss"] / parts).backward()
            totals.append({name: value.detach() for name, value in found.items()})
        self._average_gradients()
        self.scaler.unscale_(self.optimizer)
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.log.add(totals)

    def _average_gradients(self) -> None:
        """Make the gradients of every process their mean over processes."""
        if self.accelerator.num_processes > 1:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.reshape(gradient.shape))

    def read_log(self) -> dict[str, float]:
        """Log the pending updates and return the last row. This waits for the device.

        Raises ValueError for a loss or parameters that are not finite. The parameters are then set back to their last
        values known to be finite.
        """
        rows, log = self.log.read(self.accelerator), self.log.rows
        for row in rows:
            numbers = {name: value for name, value in row.items() if name != "step"}
            if not all(map(torch.isfinite, torch.tensor(list(numbers.values())))):
                self._stop(f"the loss is not finite at step {row['step']}: {numbers}; {self.diagnose()}")
            log.append(row)
            if self.accelerator.trackers:
                self.accelerator.log(numbers, step=row["step"])
        if rows and not torch.stack([p.isfinite().all() for p in self.parameters]).all():
            self._stop(f"the gradient is not finite at step {log[-1]['step']}: {log[-1]}; {self.diagnose()}")
        self._mark_good()
        return log[-1] if log else {}

    @torch.no_grad()
    def _stop(self, why: str) -> NoReturn:
        for parameter, value in zip(self.parameters, self.good, strict=True):
            parameter.copy_(value)
        raise ValueError(why)

    def _mark_good(self) -> None:
        self.good = [p.detach().clone() for p in self.parameters]

    # ---- checkpoints

    def resume(self, asked: str | None) -> bool:
        """Restore everything from a checkpoint, and say whether there is one; a new run stays as it is.

        Raises ValueError like `Checkpoints.restore`.
        """
        if (rows := self.checkpoints.restore(asked, self.device)) is None:
            return False
        self.log.rows = rows
        return True


def digest(parts: Iterable[Any]) -> str:
    """Tells the models among `parts` from others, by the first numbers of each of their weights.

    LoRAs and gates on them do not count, nor do weights that are offloaded layer by layer, which cannot be read.
    """
    models = [part for part in parts if isinstance(part, nn.Module)]
    weights = [p for model in models for name, p in model.named_parameters() if ".lora_" not in name and BANK not in name]
    heads = [p.detach().reshape(-1)[:8].cpu().double().numpy().tobytes() for p in weights if not p.is_meta]
    return hashlib.sha256(b"".join(heads)).hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state | {"run": {**json.loads(state["run"])}}  # TypeError if it is no object
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); resume from another checkpoint") from error


def join_processes(device: torch.device, **options: Any) -> Accelerator:
    """The link to the other processes of `accelerate launch`. Later runs in a process share that of the first."""
    return Accelerator(cpu=device.type == "cpu" and not is_initialized(), mixed_precision="no", **options)


def check_batch(rows: int, accelerator: Accelerator, accumulation: int, what: str) -> None:
    """Raises ValueError if a batch cannot be divided evenly."""
    if rows % (shares := accelerator.num_processes * accumulation):
        raise ValueError(f"{what}, {rows}, must be a multiple of processes x accumulation, {shares}")


def adamw(groups: list[dict[str, Any]], device: torch.device, **options: Any) -> torch.optim.AdamW:
    """AdamW; the fused one on CUDA, which skips updates with overflows by itself (others make the CPU wait to find out)."""
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **options)


def save_weight_memory(denoiser: Any, precision: str) -> None:
    """Put a denoiser into the precision of a training's forward pass, before anything that learns is put on it.

    Otherwise autocast would make a half copy of each weight, and keep it for the backward pass. This cannot be undone.
    """
    if (dtype := DTYPES.get(precision)) is not None:
        denoiser.to(dtype)


def save_activation_memory(denoiser: Any, undo: Undo) -> None:
    """Let a denoiser compute activations again in the backward pass, until `undo` restores it."""
    if not denoiser.is_gradient_checkpointing:
        undo.callback(denoiser.disable_gradient_checkpointing)
        denoiser.enable_gradient_checkpointing()


# ---- folders checkpoint-N, which are complete or absent


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and (p / STATE).exists()]
    return sorted(found, key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def find_checkpoint(folder: Path, asked: str | None) -> Path | None:
    """The checkpoint to resume from; None for a new run, also if "latest" finds none.

    Raises ValueError for a checkpoint that does not exist, or a new run in the folder of an old one.
    """
    known = checkpoints(folder)
    if asked is None:
        if known:
            raise ValueError(f"{folder} holds {known[-1].name} of an earlier run: resume 'latest', or use another folder")
        return None
    if asked == LATEST:
        return known[-1] if known else None
    if folder / asked not in known:
        raise ValueError(f"no checkpoint {asked!r} in {folder}; known: {[LATEST, *(p.name for p in known)]}")
    return folder / asked
