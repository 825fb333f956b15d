"""One-time costs: attaching, other LoRAs than before, folding gates away, and one update of the gates in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch

from benchmarks.arms import awake, load, twin
from benchmarks.clock import Measure, entering, interleaved, seconds
from benchmarks.settings import Cost, Files, Settings
from mole_diffusers.gates import GateConfig
from mole_diffusers.mixture import attach, detach

STEPS = 30  # of the picture that folding is compared to
Measured = Callable[[Settings, Any, Mapping[str, Any], Files], Mapping[str, Measure]]


def once_costs(settings: Settings, measured: Measured, experts: Sequence[int]) -> list[Cost]:
    """The costs of everything in `measured`, for each number of experts, relative to the first measure there."""
    rows = []
    with settings.host(experts) as (pipe, given, files):
        pipe.unet.requires_grad_(False)
        for n in experts:
            times = interleaved(measured(settings, pipe, given, files[n]), repeats=settings.repeats)
            first = next(iter(times.values()))
            rows += [Cost.of(name, n, seconds=took, base=first) for name, took in times.items()]
    return rows


def attaching(settings: Settings, pipe: Any, given: Mapping[str, Any], files: Files) -> dict[str, Measure]:
    """Attaching N LoRAs with gates, compared to loading the same files with diffusers."""
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


def moving(settings: Settings, pipe: Any, given: Mapping[str, Any], files: Files) -> dict[str, Measure]:
    """What a picture with one half of N LoRAs pays after one with the other half, compared to one step of the base."""
    mixture, names = attach(twin(pipe), dict(files), settings.gates), list(files)
    halves = cycle([names[: len(names) // 2], names[len(names) // 2 :]])
    ranks = mixture.parts.components[0].ranks

    @torch.no_grad()
    def step() -> None:
        pipe.unet(**given)

    @torch.no_grad()
    def moved() -> float:
        with mixture.only(*next(halves)):
            ranks.begin_call()
            return seconds(partial(ranks.before, ranks.model, (), {}), clock=settings.clock)

    return {"step": partial(seconds, step, clock=settings.clock), "others": moved}


def collapsing(settings: Settings, pipe: Any, given: Mapping[str, Any], files: Files) -> dict[str, Measure]:
    """Folding away the gates of N LoRAs, for constant gates and for gates that read the prompt. The comparison is a picture:
    STEPS steps of the base's denoiser."""
    clock = settings.clock

    @torch.no_grad()
    def step() -> None:
        pipe.unet(**given)

    still, reading = (awake(twin(pipe, own=True), files, GateConfig(f)) for f in ("static", "prompt"))
    return {
        f"{STEPS} steps": lambda: STEPS * seconds(step, clock=clock),
        "collapse static": lambda: entering(still.collapsed(), clock=clock),
        "collapse prompt": lambda: entering(reading.collapsed("a fox", guidance_scale=1.0), clock=clock),
    }


def updating(settings: Settings, pipe: Any, given: Mapping[str, Any], files: Files) -> dict[str, Measure]:
    """An AdamW update of the gates of N LoRAs, compared to a forward and a backward pass of the frozen base."""
    ours = twin(pipe)
    optimizer = torch.optim.AdamW(awake(ours, files, settings.gates).parameters(), lr=1e-4)

    def backward() -> None:
        sample = given["sample"].clone().requires_grad_()  # makes the backward pass run: no parameter needs one
        pipe.unet(**{**given, "sample": sample})[0].square().mean().backward()

    def update() -> None:
        optimizer.zero_grad()
        ours.unet(**given)[0].square().mean().backward()
        optimizer.step()

    return {name: partial(seconds, run, clock=settings.clock) for name, run in (("base", backward), ("update", update))}
