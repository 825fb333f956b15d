"""Recipe -> picture, on one pipeline: what the commands, the app and its API call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from mole_diffusers.binding.config import files_bindings
from mole_diffusers.merging.merge import METHODS, by_activations, merge
from mole_diffusers.mixture import Mixture, attach, attached, detach
from mole_diffusers.patching.pipeline_lock import PipelineLock
from mole_diffusers.studio.catalog import UNTRAINED, Catalog, gates_hash
from mole_diffusers.studio.prompt_syntax import LoraTag
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.strength_schedule import StrengthSchedule

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # A1111's name -> scheduler class of diffusers, and its options
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
MERGES = [method for method in METHODS if method != "sum" and not by_activations(method)]
MERGED = "merged"  # name of a merge on the pipeline
OnStep = Callable[[int, torch.Tensor], None]  # (steps done, latents [1, C, h, w])


class Studio:
    """One pipeline with a catalog of LoRAs and gates for it.

    Attributes:
        lock: held while a picture is drawn; hold it to do anything else with the pipeline.
    """

    def __init__(self, pipe: Any, catalog: Catalog, base: str):
        self.pipe, self.catalog, self.base = pipe, catalog, base
        self.lock = PipelineLock()
        self._own_scheduler = pipe.scheduler
        self._attached_key: tuple | None = None  # what is attached; None: unknown

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with the LoRAs' names in this catalog, every hash and the base filled in, and "auto" gates chosen.

        Raises ValueError if something is not here.
        """
        names = {tag.name: self.catalog.local_name(tag.name, recipe.experts.get(tag.name, "")) for tag in recipe.tags}
        tags = [str(dataclasses.replace(tag, name=names[tag.name])) for tag in recipe.tags]
        locks = {place: {names.get(n, n): w for n, w in row.items()} for place, row in recipe.locks.items()}
        gates = self.catalog.gates_for(names.values()) if recipe.gates == "auto" else recipe.gates
        source = self.catalog.gates_source(gates)
        digest = "" if gates in UNTRAINED else gates_hash(Path(source))
        if recipe.gates_sha256 not in ("", digest):
            raise ValueError(f"the gates {gates!r} here are not those of the recipe ({recipe.gates_sha256[:12]})")
        if recipe.sampler and recipe.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {recipe.sampler!r}; known: {', '.join(SAMPLERS)}")
        kind, _, about = recipe.arm.partition(" ")
        if kind == "merge" and about not in MERGES:
            raise ValueError(f"unknown merge {about!r}; known: {', '.join(MERGES)}")
        return dataclasses.replace(
            recipe,
            prompt=" ".join([recipe.text, *tags]).strip(),
            arm=f"alone {names.get(about, about)}" if kind == "alone" else recipe.arm,
            locks=locks,
            gates=gates,
            gates_sha256=digest,
            experts={name: self.catalog.expert(name).sha256 for name in names.values()},
            base=self.base,
        )

    def warning(self, recipe: Recipe) -> str:
        """What may be wrong with a completed recipe that can still be drawn, in one sentence; "" if nothing is."""
        others = self.catalog.other_files(recipe.gates, recipe.experts) if recipe.arm == "gates" else []
        names = ", ".join(map(repr, others))
        return f"the gates {recipe.gates!r} were trained with another file of {names}" if others else ""

    def draw(
        self,
        recipe: Recipe,
        *,
        on_step: OnStep | None = None,
        inside: Callable[[Mixture], AbstractContextManager] | None = None,
    ) -> Image.Image:
        """Draw a completed recipe.

        Args:
            on_step: called after every step; an exception in it ends the picture.
            inside: makes a context for the pipeline call from the mixture, for example its trace.
        """
        with self.lock, self._sampler(recipe.sampler), ExitStack() as stack:
            mixture = self.attach_for(recipe)
            schedule = self._schedule(recipe, [] if mixture is None else list(mixture.experts))
            if mixture is not None:
                if (weights := _fixed_weights(recipe.arm, mixture)) is not None:
                    stack.enter_context(mixture.fixed(weights))
                stack.enter_context(mixture.planned(schedule))
                if inside is not None:
                    stack.enter_context(inside(mixture))
            return self.pipe(
                recipe.text,
                negative_prompt=recipe.negative or None,
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance,
                width=recipe.width,
                height=recipe.height,
                generator=torch.Generator("cpu").manual_seed(recipe.seed),
                callback_on_step_end=schedule.on_step(None if on_step is None else _callback(on_step)),
            ).images[0]

    def attach_for(self, recipe: Recipe) -> Mixture | None:
        """Attach the LoRAs and gates of a completed recipe, unless they already are; None if it has no LoRA."""
        method = recipe.arm.removeprefix("merge ") if recipe.arm.startswith("merge ") else ""
        strengths = recipe.constant_strengths() if method else {}
        key = (list(recipe.experts.items()), recipe.gates, recipe.gates_sha256, method, list(strengths.items()))
        binding = recipe.tag_bindings() if recipe.binding != "none" and not method else None
        if key == self._attached_key and (attached(self.pipe) is None) == (not recipe.experts):
            if (mixture := attached(self.pipe)) is not None:
                mixture.bind(None if binding is None else files_bindings(mixture.experts) | binding)
            return mixture
        self.forget_attached()
        # In the order of the tags, which a file's name here does not change: the order decides the last bits of a sum.
        experts = {name: self.catalog.expert(name) for name in recipe.experts}
        if not experts:
            detach(self.pipe)
        elif method:
            merged = merge({name: (expert, strengths[name]) for name, expert in experts.items()}, method)
            attach(self.pipe, {MERGED: merged}, "sum", binding=None)
        else:
            attach(self.pipe, experts, self.catalog.gates_source(recipe.gates), binding=binding)
        self._attached_key = key
        return attached(self.pipe)

    def forget_attached(self) -> None:
        """Call this after attaching something else to the pipeline, so that the next picture attaches its own again."""
        self._attached_key = None

    def _schedule(self, recipe: Recipe, names: list[str]) -> StrengthSchedule:
        unet = getattr(self.pipe, "unet", None)
        if recipe.arm.startswith("merge "):  # strengths are in the merge, which has no gates to lock
            return StrengthSchedule(names, [LoraTag(name) for name in names], unet=unet, steps=recipe.steps)
        return StrengthSchedule(names, recipe.tags, unet=unet, steps=recipe.steps, locks=recipe.locks)

    @contextmanager
    def _sampler(self, name: str) -> Iterator[None]:
        if name:
            kind, options = SAMPLERS[name]
            self.pipe.scheduler = getattr(diffusers, kind).from_config(self._own_scheduler.config, **options)
        try:
            yield
        finally:
            self.pipe.scheduler = self._own_scheduler


def _fixed_weights(arm: str, mixture: Mixture) -> dict[str, float] | None:
    """The weights that replace the gates for an arm; None if the gates decide."""
    kind, _, about = arm.partition(" ")
    if kind == "base":
        return {}
    if kind == "alone":
        return {about: 1.0}
    return dict.fromkeys(mixture.experts, 1.0) if kind == "sum" else None


def _callback(on_step: OnStep) -> Callable[[Any, int, Any, dict], dict]:
    """`on_step` as a `callback_on_step_end` of diffusers."""

    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict) -> dict:
        on_step(index + 1, kwargs["latents"])
        return kwargs

    return callback
