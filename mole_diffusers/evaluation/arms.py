"""The composers under test, one form for all: LoRAs alone, sums, merges, sampling-time rivals, gates and their controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from mole_diffusers.attaching import Gates, attach, attached, detach
from mole_diffusers.calls import DENOISERS
from mole_diffusers.compare import sample
from mole_diffusers.evaluation.runner import Arm, Bench, Case
from mole_diffusers.evaluation.runtime import composed_scores, k_lora, switched
from mole_diffusers.gates import GateConfig
from mole_diffusers.gates.controls import TimeAverage, frozen_random, hardened, uniform
from mole_diffusers.merging.merge import METHODS, merge
from mole_diffusers.mixture import Mixture
from mole_diffusers.trace import Trace

Weights = Callable[[Bench, Case], Mapping[str, float]]  # a strength per concept
Inside = Callable[[Bench, Case, Mixture], AbstractContextManager[Any]]  # what holds while an attached mixture draws


def ones(bench: Bench, case: Case) -> dict[str, float]:
    """Every expert at strength 1."""
    return dict.fromkeys(case.experts, 1.0)


def equal_shares(bench: Bench, case: Case) -> dict[str, float]:
    """Every expert at 1 / N."""
    return dict.fromkeys(case.experts, 1 / len(case.experts))


def by_role(subject: float, style: float) -> Weights:
    """One strength for subjects and one for styles."""
    return lambda bench, case: {name: style if name in bench.styles else subject for name in case.experts}


@contextmanager
def _attached(bench: Bench, experts: Mapping[str, Any], gates: Gates) -> Iterator[Mixture]:
    try:
        yield attach(bench.pipe, experts, gates)
    finally:
        detach(bench.pipe)


def _weighed(bench: Bench, case: Case, weights: Weights) -> dict[str, Any]:
    return {name: (bench.experts[name], strength) for name, strength in weights(bench, case).items()}


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


def weighted(name: str, weights: Weights, settings: Mapping[str, Any] | None = None) -> Arm:
    """A weighted sum: what `set_adapters` gives with these strengths."""
    return Arm(name, lambda bench, case: _attached(bench, _weighed(bench, case, weights), "sum"), settings or {})


def summed(name: str = "sum", weights: Weights = ones) -> Arm:
    """Every LoRA at strength 1."""
    return weighted(name, weights)


def mean() -> Arm:
    """Normalised linear arithmetic, the baseline of MoLE: every LoRA at 1 / N."""
    return weighted("mean", equal_shares)


def searched(weights: Mapping[str, Mapping[str, float]]) -> Arm:
    """The best strengths that a search found for the case's kind: kind -> {"subject": .., "style": ..}."""

    def chosen(bench: Bench, case: Case) -> Mapping[str, float]:
        return by_role(**weights[case.kind])(bench, case)

    arm = weighted("grid search", chosen, {"weights": {kind: dict(found) for kind, found in weights.items()}})
    return Arm(arm.name, arm.draws, arm.settings, covers=lambda case: case.kind in weights)


def merged(method: str, name: str = "", weights: Weights = ones, **options: Any) -> Arm:
    """A static merge; NP-LoRA protects the case's styles, or its last concept where there is none."""

    def draws(bench: Bench, case: Case) -> Any:
        experts = _weighed(bench, case, weights)
        protect = [c for c in case.experts if c in bench.styles]
        one = merge(experts, method, protect=protect, activations=bench.activations, **options)
        return _attached(bench, {"merged": one}, "sum")

    return Arm(name or method, draws, options)


def from_file(name: str, path: Callable[[Case], Path]) -> Arm:
    """A LoRA file per case, one that was trained on all its concepts say."""
    return Arm(
        name, lambda bench, case: _attached(bench, {name: path(case)}, "sum"), covers=lambda case: path(case).exists()
    )


def composed(name: str, inside: Inside, *, gates: Gates = "sum", settings: Mapping[str, Any] | None = None) -> Arm:
    """A composer that acts while sampling on an attached mixture."""

    @contextmanager
    def draws(bench: Bench, case: Case) -> Iterator[None]:
        with _attached(bench, _weighed(bench, case, ones), gates) as mixture, inside(bench, case, mixture):
            yield

    return Arm(name, draws, settings or {})


def switch(period: int = 5) -> Arm:
    """LoRA Switch, subjects before styles, as a case names them."""
    return composed("switch", lambda b, c, m: switched(b.pipe, m, period=period), settings={"period": period})


def composite() -> Arm:
    """LoRA Composite; as many UNet calls per step as experts."""
    return composed("composite", lambda bench, case, mixture: composed_scores(bench.pipe, mixture))


def klora() -> Arm:
    """K-LoRA, for cases of two concepts; the second is what the paper calls the style."""

    def inside(bench: Bench, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        content, style = case.experts
        return k_lora(bench.pipe, mixture, content=content, style=style)

    arm = composed("k-lora", inside, gates=GateConfig("static", granularity="matrix"))
    return Arm(arm.name, arm.draws, arm.settings, covers=lambda case: len(case.experts) == 2)


def gated(name: str, folder: Callable[[Case], Path], *, weights: Weights = ones, inside: Inside | None = None) -> Arm:
    """Trained gates, one folder per case; `inside` is a context on the mixture, a control say."""

    @contextmanager
    def draws(bench: Bench, case: Case) -> Iterator[None]:
        with _attached(bench, _weighed(bench, case, weights), folder(case)) as mixture:
            if inside is None:
                yield
            else:
                with inside(bench, case, mixture):
                    yield

    return Arm(name, draws, covers=lambda case: (folder(case) / "config.json").exists())


def averaged(steps: int = 20) -> Inside:
    """The denoiser's gates at their means over the steps of one picture of the case; each guidance row keeps its own."""

    @contextmanager
    def inside(bench: Bench, case: Case, mixture: Mixture) -> Iterator[None]:
        average, rows = TimeAverage(), {}

        def watch(place: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            rows[place] = len(gates) if gates.dim() > 1 else 0
            return average.watch(place, gates, mask)

        def still(place: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            if not rows[place] or place.partition(".")[0] not in DENOISERS:
                return gates  # it depends on no row, or on no step
            pictures = len(gates) // rows[place]
            return average(place, gates[::pictures], mask).repeat_interleave(pictures, 0)

        with mixture.adjusted(watch):
            sample(bench.pipe, case.prompt, [0], num_inference_steps=steps, output_type="latent")
        with mixture.adjusted(still):
            yield

    return inside


CONTROLS: dict[str, Inside | None] = {
    "gates": None,
    "gates uniform": lambda bench, case, mixture: mixture.adjusted(uniform),
    "gates random": lambda bench, case, mixture: mixture.adjusted(frozen_random(0)),
    "gates hardened": lambda bench, case, mixture: mixture.adjusted(hardened),
    "gates averaged": averaged(),
}
MERGES = tuple(method for method in METHODS if method not in ("sum", "mean"))
PLAIN: dict[str, Callable[[], Arm]] = {
    "base": base, "sum": summed, "mean": mean, "switch": switch, "composite": composite, "k-lora": klora
}  # fmt: skip
ARMS = ("base", "alone", "sum", "mean", "grid search", *MERGES, "switch", "composite", "k-lora", *CONTROLS)


def chosen_arms(
    names: Sequence[str],
    bench: Bench,
    gates: Path | None = None,
    *,
    weights: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Arm]:
    """The named arms; those of gates and of a search need `gates` and `weights`, and are left out without.

    Args:
        gates: a folder with one folder of trained gates per case, "fox+ink".
        weights: what a search found, see `searched`.

    Raises ValueError for a name that is not one.
    """
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"unknown arms {unknown}; known: {list(ARMS)}")
    arms = []
    for name in names:
        if name == "alone":
            arms += [alone(concept) for concept in bench.experts]
        elif name == "grid search":
            arms += [searched(weights)] if weights is not None else []
        elif name in CONTROLS:
            arms += [] if gates is None else [gated(name, gates_of(gates), inside=CONTROLS[name])]
        else:
            arms.append(PLAIN[name]() if name in PLAIN else merged(name))
    return arms


def moved(names: Sequence[str], shares: Sequence[float], gates: Path | None = None) -> list[Arm]:
    """Sums, merges and gates as the user's strength moves from subjects to styles: 2 - 2s and 2s at a share s.

    They are named "sum @ 0.3", as `plots.frontier` reads them.

    Raises ValueError for an arm whose strengths cannot be moved, or a share outside 0..1.
    """
    known = ["sum", *MERGES, "gates"]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the strengths of {unknown} cannot be moved; those of {known} can")
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share must be from 0 to 1, got {wrong[0]}")
    arms = []
    for name in names:
        for share in shares:
            weights, label = by_role(2 - 2 * share, 2 * share), f"{name} @ {share:g}"
            if name == "sum":
                arms.append(weighted(label, weights))
            elif name in MERGES:
                arms.append(merged(name, label, weights))
            elif gates is not None:
                arms.append(gated(label, gates_of(gates), weights=weights))
    return arms


def traced(bench: Bench, arm: Arm, case: Case, **options: Any) -> Trace:
    """What the gates of an arm decide while one picture of a case is drawn, seed 0."""
    with arm.draws(bench, case):
        mixture = attached(bench.pipe)
        if mixture is None:
            raise ValueError(f"the arm {arm.name!r} attaches no gates")
        with mixture.trace() as trace:
            sample(bench.pipe, case.prompt, [0], **options)
    return trace


def gates_of(folder: Path) -> Callable[[Case], Path]:
    """Where a case's gates lie below `folder`."""
    return lambda case: folder / "+".join(case.experts).replace(" ", "_")
