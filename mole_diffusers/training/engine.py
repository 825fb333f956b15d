"""What every training loop shares: an update over processes and accumulated parts, its numbers, what a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from torch import nn

from mole_diffusers.training.checkpoints import STATE, find

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast, by the name of a precision
Part = Callable[[int, int], torch.Tensor]  # (index, count) -> [loss, terms...] of share `index` of `count` of a batch


@dataclass
class Engine:
    """The optimizer and all that belongs to it.

    Attributes:
        dtype: of autocast in the forward pass, None for none; float16 scales the loss.
        accumulation: parts that a process computes its share of a batch in.
        max_norm: the gradient's greatest length; 0 does not clip it.
        log: one row of numbers per update.
        pending: the numbers of updates that nobody has looked at yet, on the device.
        good: the parameters at the last look.
    """

    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    schedule: Any
    dtype: torch.dtype | None = None
    accumulation: int = 1
    max_norm: float = 1.0
    log: list[dict] = field(default_factory=list)
    pending: list[torch.Tensor] = field(default_factory=list)
    good: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    @property
    def device(self) -> torch.device:
        """Where the parameters are; what an Accelerator says is of the first run of its process."""
        return self.parameters[0].device

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def shares(self) -> int:
        """Into how many parts a batch is divided, over processes and accumulated parts."""
        return self.accelerator.num_processes * self.accumulation

    def check_batch(self, rows: int, what: str) -> None:
        """Raises ValueError where a batch cannot be divided evenly."""
        if rows % self.shares:
            raise ValueError(f"{what}, {rows}, must be a multiple of processes x accumulation, {self.shares}")

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def update(self, part: Part) -> None:
        """One step of the optimizer, without waiting for the device."""
        totals = []
        for i in range(self.accumulation):
            numbers = part(i * self.accelerator.num_processes + self.accelerator.process_index, self.shares)
            self.scaler.scale(numbers[0] / self.accumulation).backward()
            totals.append(numbers.detach())
        self._average_gradients()
        self.scaler.unscale_(self.optimizer)
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending.append(torch.stack(totals).mean(0))

    def _average_gradients(self) -> None:
        """Make every process's gradients the mean over processes."""
        if self.accelerator.num_processes > 1:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.reshape(gradient.shape))

    def settle(self, names: Sequence[str], culprit: Callable[[], str]) -> dict[str, float]:
        """Log the updates since the last look, and return the last row. This waits for the device.

        Raises ValueError for a loss, or parameters, that are not finite, with `culprit()` in its message, and the parameters
        set back to where they stood at the last look.
        """
        rows = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist() if self.pending else []
        start = len(self.log)
        self.pending.clear()
        for i, row in enumerate(rows):
            named = dict(zip(names, row, strict=True))
            if not all(map(torch.isfinite, torch.tensor(row))):
                self._stop(f"the loss is not finite at step {start + i}: {named}; {culprit()}")
            self.log.append({"step": start + i, **named})
            if self.accelerator.trackers:
                self.accelerator.log(named, step=start + i)
        if rows and not torch.stack([p.isfinite().all() for p in self.parameters]).all():
            self._stop(f"the gradient is not finite at step {self.log[-1]['step']}: {self.log[-1]}; {culprit()}")
        self.remember()
        return self.log[-1] if self.log else {}

    def _stop(self, why: str) -> NoReturn:
        _set(self.parameters, self.good)
        raise ValueError(why)

    def remember(self) -> None:
        """Note the parameters as good."""
        self.good = [p.detach().clone() for p in self.parameters]

    def parts(self) -> dict[str, Any]:
        """All that has a state of its own."""
        return {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}


def joined(device: torch.device, **options: Any) -> Accelerator:
    """This process among those that act as one. Who is among them its first run tells, on whatever device it was."""
    return Accelerator(cpu=device.type == "cpu" and not is_initialized(), mixed_precision="no", **options)


def adamw(groups: list[dict[str, Any]], device: torch.device, **options: Any) -> torch.optim.AdamW:
    """AdamW; on a CUDA card the kind that skips an update by itself where loss scaling asks it to: others wait to know."""
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **options)


def refuse_changed(before: dict[str, Any], now: dict[str, Any], where: object) -> None:
    """Raises ValueError where a run with the settings `now` cannot go on with what one with `before` left."""
    if changed := [name for name, value in now.items() if before.get(name) != value]:
        raise ValueError(f"{where} is of a run with other settings ({', '.join(changed)}); use another folder")


def restored(
    folder: Path | None, asked: str | None, *, parts: Mapping[str, Any], identity: dict[str, Any]
) -> dict[str, Any] | None:
    """What the asked checkpoint of a run holds, with `parts` set to it; None for a new run.

    Raises ValueError where it is of a run with another `identity`, and what `checkpoints.find` raises.
    """
    path = find(folder, asked) if folder else None
    if path is None:
        return None
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    refuse_changed(json.loads(state["run"]), json.loads(json.dumps(identity)), path)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state


@torch.no_grad()
def _set(parameters: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, to, strict=True):
        parameter.copy_(value)
