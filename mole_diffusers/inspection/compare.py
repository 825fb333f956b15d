"""One prompt, same seeds, side by side: base, each expert alone, plain sum, gated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image

from mole_diffusers.mixture import Mixture


def columns(mixture: Mixture) -> dict[str, Callable[[], AbstractContextManager]]:
    """What to compare on one attached mixture: label -> context in which the pipeline is called."""
    strengths = {name: mixture.strength(name) for name in mixture.experts}
    alone = {f"{n} alone": _fixed(mixture, {n: s}) for n, s in strengths.items()}
    gated = f"gated ({mixture.config.family})"
    return {"base": _fixed(mixture, {}), **alone, "sum": _fixed(mixture, strengths), gated: lambda: mixture.only(*strengths)}


def _fixed(mixture: Mixture, weights: Mapping[str, float]) -> Callable[[], AbstractContextManager]:
    return lambda: mixture.fixed(weights)


def sample(pipe: Any, prompt: str, seeds: Sequence[int], **options: Any) -> list[Image.Image]:
    """One picture per seed, each from its own generator, so that the batch does not change a picture's noise."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return pipe([prompt] * len(seeds), generator=generators, **options).images


def compare(
    pipe: Any, mixture: Mixture, prompt: str, *, seeds: Sequence[int], **options: Any
) -> dict[str, list[Image.Image]]:
    """Label -> one picture per seed, for every column of `columns`."""
    pictures = {}
    for label, context in columns(mixture).items():
        with context():
            pictures[label] = sample(pipe, prompt, seeds, **options)
    return pictures
