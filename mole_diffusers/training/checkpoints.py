"""Checkpoints of a run: folders checkpoint-N that are there whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATE = "training.pt"
LATEST = "latest"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and (p / STATE).exists()]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def write(folder: Path, step: int, state: dict[str, Any], *, gates: Callable[[Path], None], keep: int) -> None:
    """Write checkpoint-`step` with `state` and what `gates(path)` writes; then delete all but the last `keep`.

    Raises OSError where it cannot be written, the disk being full, say; earlier checkpoints stay.
    """
    path, part = folder / f"checkpoint-{step}", folder / "checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        gates(part)
        torch.save(state, part / STATE)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where the disk is full
        shutil.rmtree(part, ignore_errors=True)
        whole = [p.name for p in checkpoints(folder)]
        raise OSError(f"{path} cannot be written: {error}; whole checkpoints: {whole}") from error
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def find(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from: None for a new run, also where "latest" finds none.

    Raises ValueError for a checkpoint that is not there, or a new run in the folder of an old one.
    """
    known = checkpoints(folder)
    if resume is None:
        if known:
            raise ValueError(f"{folder} holds {known[-1].name} of an earlier run: resume 'latest', or use another folder")
        return None
    if resume == LATEST:
        return known[-1] if known else None
    if folder / resume not in known:
        raise ValueError(f"no checkpoint {resume!r} in {folder}; known: {['latest', *(p.name for p in known)]}")
    return folder / resume
