"""attach / detach: put experts and gates on a pipeline and take them off again, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mole_diffusers import checkpoint
from mole_diffusers.calls import denoiser
from mole_diffusers.gates import FAMILIES, GateConfig
from mole_diffusers.lora_files import Expert, read_expert
from mole_diffusers.mixture import HANDLE, Mixture

Source = str | Path | Expert
Gates = str | Path | GateConfig


def attach(pipe: Any, experts: Mapping[str, Source | tuple[Source, float]], gates: Gates = "sum") -> Mixture:
    """Put concept LoRAs on a pipeline, weighed by gates. Attaching again replaces; `detach` gives the original back.

    Args:
        pipe: any pipeline with a `unet` or a `transformer`.
        experts: name -> file, or (file, strength). Strength is the user's own factor: any sign and size, 1 by default,
            0 means absent.
        gates: a family (one of `gates.FAMILIES`), a GateConfig, a folder that `save_pretrained` wrote, or a hub id.

    Returns:
        The mixture, the handle for strengths, masks, traces, training and saving.

    Raises:
        ValueError, FileNotFoundError: a bad file, layer, family or gate folder; the pipeline stays as it was.
    """
    with _held(pipe) as before:
        mixture = _prepared(pipe, experts, gates)
        mixture._replace(before)
    for name, keys in mixture.unmatched.items():
        if keys:
            warnings.warn(
                f"expert {name!r}: the pipeline lacks {len(keys)} of its layers, {keys[0]!r} for one", stacklevel=2
            )
    return mixture


def _prepared(pipe: Any, experts: Mapping[str, Source | tuple[Source, float]], gates: Gates) -> Mixture:
    """Read and check everything; nothing of the pipeline is changed."""
    read, strengths = {}, {}
    for name, given in experts.items():
        source, strengths[name] = given if isinstance(given, tuple) else (given, 1.0)
        read[name] = source if isinstance(source, Expert) else read_expert(source, name)
    if not read:
        raise ValueError("attach needs at least one expert")
    if isinstance(gates, GateConfig) or str(gates) in FAMILIES:
        config = gates if isinstance(gates, GateConfig) else GateConfig(family=str(gates))
        mixture = Mixture(pipe, read, config)
    else:
        saved = checkpoint.load(gates)
        mixture = Mixture(pipe, {name: read[name] for name in saved.order(read)}, saved.config)
        saved.fill(mixture.banks)
    for name, strength in strengths.items():
        mixture.strength(name, strength)
    return mixture


def detach(pipe: Any) -> None:
    """Give back the original pipeline, bit for bit. Does nothing where nothing is attached."""
    with _held(pipe) as mixture:
        if mixture is not None:
            mixture._uninstall()


def attached(pipe: Any) -> Mixture | None:
    """The mixture on a pipeline, if any."""
    return getattr(denoiser(pipe), HANDLE, None)


@contextmanager
def _held(pipe: Any) -> Iterator[Mixture | None]:
    """The mixture on a pipeline, with all other threads kept out; one that takes its place takes over its turns."""
    before = attached(pipe)
    with nullcontext() if before is None else before._turn:
        yield attached(pipe)
