"""The composers under test, one form for all: LoRAs alone, sums, merges, sampling-time rivals, gates and their controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mole_diffusers.evaluation.digests import of_files, of_texts
from mole_diffusers.evaluation.runner import Arm, Bench, Case
from mole_diffusers.evaluation.runtime import composed_scores, k_lora, last_content, switched
from mole_diffusers.gates import GateConfig, checkpoint
from mole_diffusers.gates.transforms import TimeAverage, frozen_random, hardened, uniform
from mole_diffusers.inspection.compare import sample
from mole_diffusers.merging.merge import by_activations, merge, resolved
from mole_diffusers.mixture import Gates, Mixture, attach, attached, detach
from mole_diffusers.patching.denoiser_inputs import DENOISERS
from mole_diffusers.patching.trace import Trace

Weights = Callable[[Bench, Case], Mapping[str, float]]  # a weight per concept, which the user's own strength multiplies
Inside = Callable[[Bench, Case, Mixture], AbstractContextManager[Any]]  # what holds while an attached mixture draws
Settings = Callable[[Bench, Case], Mapping[str, Any]]  # what a row says, see `Arm.settings`
Order = Callable[[Bench, Case], Sequence[str]]  # a case's experts, in the order in which a composer takes them


def ones(bench: Bench, case: Case) -> dict[str, float]:
    """Every expert at the strength that the user gave it."""
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


def _said(**more: Any) -> Settings:
    """The case's experts, and `more`."""
    return lambda bench, case: bench.used(case.experts) | more


def base() -> Arm:
    """No LoRA at all."""

    @contextmanager
    def draws(bench: Bench, case: Case) -> Iterator[None]:
        detach(bench.pipe)
        yield

    return Arm("base", draws, lambda bench, case: {})


def alone(concept: str) -> Arm:
    """One concept's LoRA alone on the whole prompt: the upper bound for that concept."""
    return Arm(
        f"alone {concept}",
        lambda bench, _: _attached(bench, bench.weighed({concept: 1.0}), "sum"),
        lambda bench, _: bench.used([concept]),
        covers=lambda case: concept in case.concepts,
    )


def weighted(name: str, weights: Weights, /, **settings: Any) -> Arm:
    """A weighted sum: what `set_adapters` gives with these strengths; `settings` say them in the rows."""
    return Arm(name, lambda bench, case: _attached(bench, bench.weighed(weights(bench, case)), "sum"), _said(**settings))


def summed(name: str = "sum", weights: Weights = ones) -> Arm:
    """Every LoRA at the user's own strength."""
    return weighted(name, weights)


def mean() -> Arm:
    """Normalised linear arithmetic, the baseline of MoLE: every LoRA at 1 / N."""
    return weighted("mean", equal_shares)


def searched(weights: Mapping[str, Mapping[str, float]]) -> Arm:
    """The best strengths that a search found for the case's kind: kind -> {"subject": .., "style": ..}."""

    def chosen(bench: Bench, case: Case) -> Mapping[str, float]:
        return by_role(**weights[case.kind])(bench, case)

    arm = weighted("grid search", chosen, weights={kind: dict(found) for kind, found in weights.items()})
    return replace(arm, covers=lambda case: case.kind in weights)


def merged(method: str, name: str = "", weights: Weights = ones, *, rank: int | None = None, **options: Any) -> Arm:
    """A static merge; NP-LoRA protects the case's styles, or its last concept where there is none."""
    chosen = resolved(method, options)

    def draws(bench: Bench, case: Case) -> Any:
        experts, protect = bench.weighed(weights(bench, case)), _styles(bench, case)
        one = merge(experts, method, rank=rank, protect=protect, activations=bench.activations, **chosen)
        return _attached(bench, {"merged": one}, "sum")

    def settings(bench: Bench, case: Case) -> Mapping[str, Any]:
        said = bench.used(case.experts) | {"method": method, "rank": rank} | chosen
        if method == "np":
            said["protect"] = _styles(bench, case)
        return said | (_own_runs(bench, case) if by_activations(method) else {})

    return Arm(name or method, draws, settings)


def _styles(bench: Bench, case: Case) -> list[str]:
    return [concept for concept in case.experts if concept in bench.styles]


def _own_runs(bench: Bench, case: Case) -> dict[str, Any]:
    """How each of a case's experts is run alone for the merges that need it."""
    runs = bench.activations
    own = of_texts(*(prompt for name in case.experts for prompt in bench.prompts.get(name, ())))
    return {"own_prompts": own, "own_steps": runs.steps, "own_rows": runs.rows, "own_seed": runs.seed}


def from_file(name: str, path: Callable[[Case], Path]) -> Arm:
    """A LoRA file per case, one that was trained on all its concepts say; it takes no strengths of concepts."""

    def draws(bench: Bench, case: Case) -> Any:
        if bench.strengths:
            raise ValueError(f"the arm {name!r} is one LoRA, which cannot take strengths of {sorted(bench.strengths)}")
        return _attached(bench, {name: path(case)}, "sum")

    return Arm(
        name,
        draws,
        lambda bench, case: {"file": of_files(path(case))},
        covers=lambda case: path(case).exists(),
    )


def as_named(bench: Bench, case: Case) -> Sequence[str]:
    """A case's experts as it names them, those that only stand by last."""
    return case.experts


def subjects_first(bench: Bench, names: Sequence[str]) -> list[str]:
    """Subjects as they come, then styles as they come."""
    return sorted(names, key=lambda name: name in bench.styles)


def composed(name: str, inside: Inside, *, gates: Gates = "sum", order: Order = as_named, **settings: Any) -> Arm:
    """A composer that acts while sampling on a mixture attached in an order; `settings` say in the rows how."""

    @contextmanager
    def draws(bench: Bench, case: Case) -> Iterator[None]:
        experts = bench.weighed(dict.fromkeys(order(bench, case), 1.0))
        with _attached(bench, experts, gates) as mixture, inside(bench, case, mixture):
            yield

    return Arm(name, draws, lambda bench, case: bench.used(order(bench, case)) | settings)


def switch(period: int = 5) -> Arm:
    """LoRA Switch: what a case asks for in turn, subjects before styles, then what only stands by."""
    return composed(
        "switch",
        lambda bench, case, mixture: switched(bench.pipe, mixture, period=period),
        order=lambda bench, case: [*subjects_first(bench, case.concepts), *case.idle],
        period=period,
    )


def composite() -> Arm:
    """LoRA Composite; as many UNet calls per step as experts."""
    return composed("composite", lambda bench, case, mixture: composed_scores(bench.pipe, mixture))


def klora() -> Arm:
    """K-LoRA, for cases of two experts: its style is the one that is a style, or the second where that does not say."""

    def inside(bench: Bench, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        content, style = mixture.experts
        return k_lora(bench.pipe, mixture, content=content, style=style)

    gates, options = GateConfig("static", granularity="matrix"), last_content.__kwdefaults__ or {}
    arm = composed("k-lora", inside, gates=gates, order=lambda b, c: subjects_first(b, c.experts), **options)
    return replace(arm, covers=lambda case: len(case.experts) == 2)


def as_trained(bench: Bench, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
    """The gates as they are: no control."""
    return nullcontext()


def gated(name: str, folder: Callable[[Case], Path], *, weights: Weights = ones, inside: Inside = as_trained) -> Arm:
    """Trained gates, one folder per case; `inside` is a context on the mixture, a control say."""

    @contextmanager
    def draws(bench: Bench, case: Case) -> Iterator[None]:
        with _attached(bench, bench.weighed(weights(bench, case)), folder(case)) as mixture, inside(bench, case, mixture):
            yield

    def settings(bench: Bench, case: Case) -> Mapping[str, Any]:
        files = [folder(case) / file for file in (checkpoint.CONFIG, checkpoint.WEIGHTS)]
        return bench.used(case.experts) | {"gates": of_files(*files)}

    return Arm(name, draws, settings, covers=lambda case: (folder(case) / checkpoint.CONFIG).exists())


@contextmanager
def averaged(bench: Bench, case: Case, mixture: Mixture) -> Iterator[None]:
    """The denoiser's gates at their means over the steps of one picture of the case, drawn as the bench draws; each
    guidance row keeps its own."""
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
        sample(bench.pipe, case.prompt, [0], **{**bench.options, "output_type": "latent"})
    with mixture.adjusted(still):
        yield


CONTROLS: dict[str, Inside] = {
    "gates": as_trained,
    "gates uniform": lambda bench, case, mixture: mixture.adjusted(uniform),
    "gates random": lambda bench, case, mixture: mixture.adjusted(frozen_random(0)),
    "gates hardened": lambda bench, case, mixture: mixture.adjusted(hardened),
    "gates averaged": averaged,
}


def traced(bench: Bench, arm: Arm, case: Case) -> Trace:
    """What the gates of an arm decide while one picture of a case is drawn, seed 0."""
    with arm.draws(bench, case):
        mixture = attached(bench.pipe)
        if mixture is None:
            raise ValueError(f"the arm {arm.name!r} attaches no gates")
        with mixture.trace() as trace:
            sample(bench.pipe, case.prompt, [0], **bench.options)
    return trace


def gates_of(folder: Path) -> Callable[[Case], Path]:
    """Where a case's gates lie below `folder`."""
    return lambda case: folder / "+".join(case.experts).replace(" ", "_")
