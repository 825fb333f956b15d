"""What is paid once: attaching, folding gates away, and one update of the gates in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.arms import Files, awake, load, twin
from benchmarks.clock import Measure, entering, interleaved, seconds
from benchmarks.hosts import inputs, lora_files
from benchmarks.settings import Cost, Settings
from mole_diffusers.gates import GateConfig
from mole_diffusers.mixture import attach, detach

STEPS = 30  # of the picture that folding is compared with


def attach_costs(settings: Settings, experts: Sequence[int]) -> list[Cost]:
    """Attaching N LoRAs with gates, against diffusers' loading of the same files."""
    return _costs(_attaching, settings, experts)


def collapse_costs(settings: Settings, experts: Sequence[int]) -> list[Cost]:
    """Folding the gates of N LoRAs away, of gates that stand still and of gates that read the prompt, against a picture of
    STEPS steps of the base's denoiser."""
    return _costs(_collapsing, settings, experts)


def update_costs(settings: Settings, experts: Sequence[int]) -> list[Cost]:
    """An update of the gates of N LoRAs by AdamW, against a forward and a backward pass of the frozen base."""
    return _costs(_updating, settings, experts)


def _costs(
    measured: Callable[[Settings, Any, Files], Mapping[str, Measure]], settings: Settings, experts: Sequence[int]
) -> list[Cost]:
    """Of all that is `measured`, against what comes first there."""
    pipe, rows = settings.host(), []
    pipe.unet.requires_grad_(False)
    with TemporaryDirectory() as folder:
        files = lora_files(pipe.unet, Path(folder), max(experts), rank=settings.rank)
        for n in experts:
            measures = measured(settings, pipe, dict(list(files.items())[:n]))
            times = interleaved(measures, repeats=settings.repeats)
            first = times[next(iter(measures))]
            rows += [Cost.of(name, n, seconds=took, base=first) for name, took in times.items()]
    return rows


def _attaching(settings: Settings, pipe: Any, files: Files) -> dict[str, Measure]:
    theirs, ours, clock = twin(pipe), twin(pipe), settings.clock

    def loaded() -> float:
        took = seconds(partial(load, theirs, files), clock=clock)
        theirs.unload_lora_weights()
        return took

    def put() -> float:
        took = seconds(partial(attach, ours, dict(files), settings.gates), clock=clock)
        detach(ours)
        return took

    return {"load": loaded, "attach": put}


def _collapsing(settings: Settings, pipe: Any, files: Files) -> dict[str, Measure]:
    given, clock = inputs(pipe, settings.size, pixels=settings.side), settings.clock

    @torch.no_grad()
    def step() -> None:
        pipe.unet(**given)

    still, reading = (awake(twin(pipe, own=True), files, GateConfig(f)) for f in ("static", "prompt"))
    return {
        f"{STEPS} steps": lambda: STEPS * seconds(step, clock=clock),
        "collapse static": lambda: entering(still.collapsed(), clock=clock),
        "collapse prompt": lambda: entering(reading.collapsed("a fox", guidance_scale=1.0), clock=clock),
    }


def _updating(settings: Settings, pipe: Any, files: Files) -> dict[str, Measure]:
    given, ours = inputs(pipe, settings.size, pixels=settings.side), twin(pipe)
    mixture = awake(ours, files, settings.gates)
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=1e-4)

    def backward() -> None:
        sample = given["sample"].clone().requires_grad_()  # a pass all the way back: no parameter asks for one
        pipe.unet(**given | {"sample": sample})[0].square().mean().backward()

    def update() -> None:
        optimizer.zero_grad()
        ours.unet(**given)[0].square().mean().backward()
        optimizer.step()

    return {name: partial(seconds, run, clock=settings.clock) for name, run in (("base", backward), ("update", update))}
