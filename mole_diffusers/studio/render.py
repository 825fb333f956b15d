"""Recipe -> picture, on one pipeline. The function behind the command, the app and its API."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import diffusers
import torch
from PIL import Image

from mole_diffusers.merging.merge import METHODS, by_activations, merge
from mole_diffusers.mixture import Mixture, attach, attached, detach
from mole_diffusers.studio.block_weights import StrengthSchedule
from mole_diffusers.studio.catalog import UNTRAINED, Catalog, gates_hash
from mole_diffusers.studio.prompt_syntax import LoraTag
from mole_diffusers.studio.recipe import Recipe

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # as A1111 calls them
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
MERGES = [method for method in METHODS if method != "sum" and not by_activations(method)]
MERGED = "merged"  # what a merge is called on the pipeline
OnStep = Callable[[int, torch.Tensor], None]  # (step done, latents [1, C, h, w])


class StoppedError(Exception):
    """Raised by a callback to end a picture early."""


class Studio:
    """One pipeline, what can be put on it, and the lock that everyone who uses it holds."""

    def __init__(self, pipe: Any, catalog: Catalog, base: str):
        self.pipe, self.catalog, self.base = pipe, catalog, base
        self.lock = threading.RLock()
        self._own = pipe.scheduler
        self._key: tuple | None = None

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with the LoRAs' names as they are here, every hash and the base; "auto" gates are chosen.

        Raises ValueError for what is not here.
        """
        names = {tag.name: self.catalog.named(tag.name, recipe.experts.get(tag.name, "")) for tag in recipe.tags}
        tags = [str(dataclasses.replace(tag, name=names[tag.name])) for tag in recipe.tags]
        locks = {place: {names.get(n, n): w for n, w in row.items()} for place, row in recipe.locks.items()}
        gates = self.catalog.gates_for(names.values()) if recipe.gates == "auto" else recipe.gates
        source = self.catalog.gates_source(gates)
        digest = "" if source in UNTRAINED else gates_hash(source)  # type: ignore[arg-type]
        if recipe.gates_sha256 not in ("", digest):
            raise ValueError(f"the gates {gates!r} here are not those of the recipe ({recipe.gates_sha256[:12]})")
        if recipe.sampler and recipe.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {recipe.sampler!r}; known: {', '.join(SAMPLERS)}")
        if recipe.arm.startswith("merge ") and _of("merge", recipe) not in MERGES:
            raise ValueError(f"unknown merge {_of('merge', recipe)!r}; known: {', '.join(MERGES)}")
        return dataclasses.replace(
            recipe,
            prompt=" ".join([recipe.text, *tags]).strip(),
            arm=f"alone {names.get(alone, alone)}" if (alone := _of("alone", recipe)) else recipe.arm,
            locks=locks,
            gates=gates,
            gates_sha256=digest,
            experts={name: self.catalog.expert(name).sha256 for name in names.values()},
            base=self.base,
        )

    def doubt(self, recipe: Recipe) -> str:
        """What may be wrong with a completed recipe though it can be drawn, in a sentence; "" where nothing is."""
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
            on_step: called after every step; what it raises ends the picture.
            inside: a context on the mixture around the call, a trace say.
        """
        with self.lock, self._sampler(recipe.sampler):
            mixture = self.prepared(recipe)
            plan = self._plan(recipe, [] if mixture is None else list(mixture.experts))
            callback = plan.on_step(_step_callback(on_step))
            if mixture is None:
                return self._call(recipe, callback)
            with _arm(mixture, recipe.arm), mixture.planned(plan), inside(mixture) if inside else nullcontext():
                return self._call(recipe, callback)

    def prepared(self, recipe: Recipe) -> Mixture | None:
        """Attach what a completed recipe asks for; what is attached already stays."""
        merged = (recipe.arm, tuple(recipe.constant_strengths().items())) if _of("merge", recipe) else ()
        key = (tuple(sorted(recipe.experts.items())), recipe.gates, recipe.gates_sha256, merged)
        if key != self._key or (attached(self.pipe) is None) != (not recipe.experts):
            self.forget()
            if recipe.experts:
                self._attach(recipe)
            else:
                detach(self.pipe)
            self._key = key
        return attached(self.pipe)

    def _attach(self, recipe: Recipe) -> None:
        experts = {name: self.catalog.expert(name) for name in sorted(recipe.experts)}
        if method := _of("merge", recipe):
            strengths = recipe.constant_strengths()
            one = merge({name: (expert, strengths[name]) for name, expert in experts.items()}, method)
            attach(self.pipe, {MERGED: one}, "sum")
        else:
            attach(self.pipe, experts, self.catalog.gates_source(recipe.gates))  # type: ignore[arg-type]

    def _plan(self, recipe: Recipe, names: list[str]) -> StrengthSchedule:
        unet = getattr(self.pipe, "unet", None)
        if _of("merge", recipe):  # the strengths are in the merge, and it has no gates to lock
            return StrengthSchedule(names, [LoraTag(name) for name in names], unet=unet, steps=recipe.steps)
        return StrengthSchedule(names, recipe.tags, unet=unet, steps=recipe.steps, locks=recipe.locks)

    def forget(self) -> None:
        """Say that what is attached was changed by others, so that the next picture attaches anew."""
        self._key = None

    def _call(self, recipe: Recipe, callback: Callable) -> Image.Image:
        return self.pipe(
            recipe.text,
            negative_prompt=recipe.negative or None,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            width=recipe.width,
            height=recipe.height,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
            callback_on_step_end=callback,
        ).images[0]

    @contextmanager
    def _sampler(self, name: str) -> Iterator[None]:
        if name:
            kind, options = SAMPLERS[name]
            self.pipe.scheduler = getattr(diffusers, kind).from_config(self._own.config, **options)
        try:
            yield
        finally:
            self.pipe.scheduler = self._own


def _of(kind: str, recipe: Recipe) -> str:
    """What an arm of this kind names, the method of a "merge" say; "" for another arm."""
    found, _, name = recipe.arm.partition(" ")
    return name if found == kind else ""


def _arm(mixture: Mixture | None, arm: str) -> AbstractContextManager:
    if mixture is None or arm == "gates" or arm.startswith("merge "):
        return nullcontext()
    if arm == "base":
        return mixture.fixed({})
    return mixture.fixed({arm.partition(" ")[2]: 1.0} if arm != "sum" else dict.fromkeys(mixture.experts, 1.0))


def _step_callback(on_step: OnStep | None) -> Callable[[Any, int, Any, dict], dict] | None:
    if on_step is None:
        return None

    def called(pipe: Any, index: int, timestep: Any, kwargs: dict) -> dict:
        on_step(index + 1, kwargs["latents"])
        return kwargs

    return called
