"""The composers under test, one form for all: LoRAs alone, sums, merges, gates and their controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole_diffusers.evaluation.runner import Arm, Bench, Case
from mole_diffusers.lora_files import Expert
from mole_diffusers.mixture import Gates, Mixture, attach, detach

Weights = Callable[[Case], Mapping[str, float]]  # a strength per concept


@contextmanager
def _attached(bench: Bench, experts: Mapping[str, Any], gates: Gates) -> Iterator[Mixture]:
    try:
        yield attach(bench.pipe, experts, gates)
    finally:
        detach(bench.pipe)


def base() -> Arm:
    """No LoRA at all."""

    @contextmanager
    def draws(bench: Bench, case: Case) -> Iterator[None]:
        detach(bench.pipe)
        yield

    return Arm("base", draws)


def alone(concept: str) -> Arm:
    """One concept's LoRA alone on the whole prompt: the upper bound for that concept."""
    return Arm(
        f"alone {concept}",
        lambda bench, _: _attached(bench, {concept: bench.experts[concept]}, "sum"),
        covers=lambda case: concept in case.concepts,
    )


def weighted(name: str, weights: Weights, settings: Mapping[str, Any]) -> Arm:
    """A weighted sum: what `set_adapters` gives with these strengths."""

    def draws(bench: Bench, case: Case) -> Any:
        chosen = weights(case)
        return _attached(bench, {c: (bench.experts[c], chosen[c]) for c in case.concepts}, "sum")

    return Arm(name, draws, settings)


def summed() -> Arm:
    """Every LoRA at strength 1."""
    return weighted("sum", lambda case: dict.fromkeys(case.concepts, 1.0), {})


def mean() -> Arm:
    """Normalised linear arithmetic, the baseline of MoLE: every LoRA at 1 / N."""
    return weighted("mean", lambda case: dict.fromkeys(case.concepts, 1 / len(case.concepts)), {})


def gated(name: str, folder: Callable[[Case], Path], *, inside: Callable[[Mixture], Any] | None = None) -> Arm:
    """Trained gates, one folder per case; `inside` is a context on the mixture, a control say."""

    @contextmanager
    def draws(bench: Bench, case: Case) -> Iterator[None]:
        with _attached(bench, {c: bench.experts[c] for c in case.concepts}, folder(case)) as mixture:
            if inside is None:
                yield
            else:
                with inside(mixture):
                    yield

    return Arm(name, draws, covers=lambda case: (folder(case) / "config.json").exists())


def merged(name: str, merge: Callable[[Bench, Case], Expert], settings: Mapping[str, Any]) -> Arm:
    """A merge: one ordinary LoRA that stands for all concepts."""
    return Arm(name, lambda bench, case: _attached(bench, {name: merge(bench, case)}, "sum"), settings)


def from_file(name: str, path: Callable[[Case], Path]) -> Arm:
    """A LoRA file per case, one that was trained on all its concepts say."""
    return Arm(
        name, lambda bench, case: _attached(bench, {name: path(case)}, "sum"), covers=lambda case: path(case).exists()
    )


ARMS = ("base", "alone", "sum", "mean", "gates")


def chosen_arms(names: Sequence[str], bench: Bench, gates: Path | None = None) -> list[Arm]:
    """The named arms; `gates` is a folder with one folder of trained gates per case, "fox+ink".

    Raises ValueError for a name that is not one.
    """
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"unknown arms {unknown}; known: {list(ARMS)}")
    arms = []
    for name in names:
        if name == "alone":
            arms += [alone(concept) for concept in bench.experts]
        elif name != "gates":
            arms.append({"base": base, "sum": summed, "mean": mean}[name]())
        elif gates is not None:
            arms.append(gated("gates", lambda case: gates / case.name.replace(" ", "_")))
    return arms
