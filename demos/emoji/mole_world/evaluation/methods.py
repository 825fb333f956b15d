"""Methods: every composer under test in one form, and the methods by name.

They are single LoRAs, weighted sums, merges, binding, trained gates and their controls. A file of your own can add others,
see `methods_from`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mole_diffusers import GateConfig, Mixture, attach, detach
from mole_diffusers.binding import Bound, to_json
from mole_diffusers.gates import GATE_CONFIG, GATE_WEIGHTS, frozen_random, hardened, uniform
from mole_diffusers.inspection import sample
from mole_diffusers.merging import METHODS as MERGE_METHODS
from mole_diffusers.merging import by_activations, check_fits, merge, resolved
from mole_world.evaluation.rows import digest_files, digest_texts
from mole_world.evaluation.runner import ByKind, Case, Method, Setup

UNTIL = 0.8  # the share of the steps after which tiles are drawn as one picture
Weights = Callable[[Setup, Case], Mapping[str, float]]  # a weight per concept, multiplied with the user's own strength
Inside = Callable[[Setup, Case, Mixture], AbstractContextManager[Any]]  # the context in which an attached mixture draws
Binding = Callable[[Setup, Case], Mapping[str, Any]]  # words and regions, as `Mixture.bind` takes them
# A method, or for what depends on the setup a function that makes them and raises ValueError like `Method.needs`.
KnownMethod = Method | Callable[[Setup], Sequence[Method]]


def ones(setup: Setup, case: Case) -> dict[str, float]:
    """Every expert at the user's own strength."""
    return dict.fromkeys(case.experts, 1.0)


def from_files(setup: Setup, case: Case) -> dict[str, Any]:
    """Bind to the trigger words of the files, and find the places."""
    return {}


def by_role(subject: float, style: float) -> Weights:
    """One strength for subjects and one for styles."""
    return lambda setup, case: {name: style if name in setup.styles else subject for name in case.experts}


@contextmanager
def attached_to(
    setup: Setup, experts: Mapping[str, Any], gates: str | Path | GateConfig, binding: Mapping[str, Any] | None = None
) -> Iterator[Mixture]:
    """The mixture, attached inside the context; bound only if `binding` says how."""
    try:
        yield attach(setup.pipe, experts, gates, binding=binding)
    finally:
        detach(setup.pipe)


def base() -> Method:
    """No LoRA at all."""

    def draws(setup: Setup, case: Case) -> AbstractContextManager[None]:
        detach(setup.pipe)
        return nullcontext()

    return Method("base", draws, lambda setup, case: {})


def as_they_are(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
    """Leave the gates unchanged while a picture is drawn."""
    return nullcontext()


def weighted(
    name: str,
    weights: Weights = ones,
    /,
    *,
    gates: str | Path | GateConfig | Callable[[Case], Path] = "sum",
    binding: Binding | None = None,
    context: Inside = as_they_are,
    covers: Callable[[Case], bool] = lambda case: True,
    needs: Callable[[Setup], None] = lambda setup: None,
    reads_words: bool = False,
    **settings: Any,
) -> Method:
    """The LoRAs of a case attached with these weights: by default a weighted sum, like `set_adapters` with these strengths.

    Args:
        weights: the weights; their order is also that of the experts.
        gates: weigh the experts on top, or a function that returns the folder of a case's trained gates. Without that
            folder the case cannot be drawn.
        binding: words and regions beyond the trigger words of the files; None binds nothing.
        context: the context in which the case is drawn.
        covers: which cases it can draw.
        needs: what it needs of a setup, as `Method` has it.
        reads_words: whether its context reads the trigger words of the files, as every binding does.
        settings: what rows state besides experts, binding and trained gates. If it depends on the case, give functions.
    """

    @contextmanager
    def draws(setup: Setup, case: Case) -> Iterator[Mixture]:
        experts = setup.weighted_experts(weights(setup, case))
        said, weighing = binding(setup, case) if binding else None, gates(case) if callable(gates) else gates
        with attached_to(setup, experts, weighing, said) as mixture, mixture.tiled(0), context(setup, case, mixture):
            yield mixture

    def described(setup: Setup, case: Case) -> Mapping[str, Any]:
        found = setup.expert_settings(weights(setup, case), words=reads_words or binding is not None)
        found |= {key: value(setup, case) if callable(value) else value for key, value in settings.items()}
        if binding:
            said = binding(setup, case).items()
            found["binding"] = {name: to_json(value) if isinstance(value, Bound) else value for name, value in said}
        if callable(gates):
            found["gates"] = digest_files(gates(case) / GATE_CONFIG, gates(case) / GATE_WEIGHTS)
        return found

    def can_draw(case: Case) -> bool:
        return covers(case) and (not callable(gates) or (gates(case) / GATE_CONFIG).exists())

    return Method(name, draws, described, can_draw, needs)


def alone(concept: str) -> Method:
    """Only one concept's LoRA, on the whole prompt: the upper bound for that concept."""
    return weighted(f"alone {concept}", lambda setup, case: {concept: 1.0}, covers=lambda case: concept in case.concepts)


def summed() -> Method:
    """Every LoRA at the user's own strength."""
    return weighted("sum")


def mean() -> Method:
    """Every LoRA at 1 / N: normalised linear arithmetic, the baseline of MoLE."""
    return weighted("mean", lambda setup, case: dict.fromkeys(case.experts, 1 / len(case.experts)))


def bound(name: str = "bound", binding: Binding = from_files) -> Method:
    """Every LoRA at the user's own strength, on its own words and in its own place; see `Mixture.bind`."""
    return weighted(name, binding=binding)


def words_only() -> Method:
    """Every LoRA on its own words, and in the whole picture."""
    return bound("words only", lambda setup, case: dict.fromkeys(case.experts, (None, "everywhere")))


def in_tiles(
    name: str = "tiles", since: float | None = None, gates: str | Path | GateConfig | Callable[[Case], Path] = "sum"
) -> Method:
    """Bound, with each subject drawn in its own tile from a share of the steps on; see `Mixture.tiled` and `weighted`."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return mixture.tiled(UNTIL, since=since, prompt=case.prompt)

    return weighted(name, gates=gates, binding=from_files, context=context, needs=a_unet, since=since, until=UNTIL)


def a_unet(setup: Setup) -> None:
    """A pipeline with a UNet."""
    if getattr(setup.pipe, "unet", None) is None:
        raise ValueError(f"needs a unet, unlike {type(setup.pipe).__name__}")


def searched(weights: ByKind | None) -> Method:
    """The best strengths that a search found for this kind of case, see `strength_search.best_weights`."""
    if weights is None:
        raise ValueError("needs the weights of a search")
    return weighted(
        "grid search",
        lambda setup, case: by_role(**weights[case.kind])(setup, case),
        covers=lambda case: case.kind in weights,
        weights=weights,
    )


def merged(method: str, name: str = "", weights: Weights = ones) -> Method:
    """A training-free merge; NP-LoRA protects the case's styles, or its last concept if there is no style."""

    def styles(setup: Setup, case: Case) -> list[str]:
        return [concept for concept in case.experts if concept in setup.styles]

    def draws(setup: Setup, case: Case) -> AbstractContextManager[Any]:
        experts, protect = setup.weighted_experts(weights(setup, case)), styles(setup, case)
        one = merge(experts, method, protect=protect, activations=setup.activations)
        return attached_to(setup, {"merged": one}, "sum")

    def settings(setup: Setup, case: Case) -> Mapping[str, Any]:
        found = setup.expert_settings(weights(setup, case)) | {"method": method, "rank": None} | resolved(method, {})
        if method == "np":
            found["protect"] = styles(setup, case)
        if by_activations(method):
            runs, prompts = setup.activations, [p for name in case.experts for p in setup.prompts.get(name, ())]
            found["own_prompts"] = digest_texts(*prompts)
            found |= {"own_steps": runs.steps, "own_rows": runs.rows, "own_seed": runs.seed}
        return found

    def needs(setup: Setup) -> None:
        try:
            check_fits(list(setup.experts.values()), method)
            if by_activations(method):
                setup.activations.check_prompts(setup.experts)
        except ValueError as error:
            raise ValueError(f"cannot be drawn: {error}") from error

    return Method(name or method, draws, settings, needs=needs)


def subjects_of(setup: Setup, case: Case) -> list[str]:
    """The concepts of a case that are not styles."""
    return [name for name in case.concepts if name not in setup.styles]


def gates_of(folder: Path) -> Callable[[Case], Path]:
    """The folder of a case's gates inside `folder`: "fox+french_fries"."""
    return lambda case: folder / "+".join(case.experts).replace(" ", "_")


def trained(name: str, weights: Weights = ones, /, **how: Any) -> KnownMethod:
    """The trained gates of a setup; `how` as in `weighted`."""

    def made(setup: Setup) -> list[Method]:
        if setup.gates is None:
            raise ValueError("needs a folder of trained gates")
        return [weighted(name, weights, gates=gates_of(setup.gates), **how)]

    return made


@contextmanager
def averaged(setup: Setup, case: Case, mixture: Mixture) -> Iterator[None]:
    """Replace the denoiser's gates by their means over the steps of one picture of the case, separately per guidance row."""
    seen: dict[str, tuple[torch.Tensor, int]] = {}  # place and experts -> the sum of the gates, and the number of steps

    def record(place: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        total, steps = seen.get(f"{place} {mask.tolist()}", (torch.zeros_like(gates), 0))
        seen[f"{place} {mask.tolist()}"] = total + gates, steps + 1
        return gates

    def replay(place: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if gates.dim() < 2 or place.startswith("text_encoder"):
            return gates  # these gates do not depend on the row, or on the step
        total, steps = seen[f"{place} {mask.tolist()}"]
        return (total / steps).repeat_interleave(len(gates) // len(total), 0)

    with mixture.adjusted(record):
        sample(setup.pipe, case.prompt, [0], **{**setup.call_of(case), "output_type": "latent"})
    with mixture.adjusted(replay):
        yield


# ---- methods by name


MERGES = tuple(method for method in MERGE_METHODS if method not in ("sum", "mean"))
CONTROLS: dict[str, Inside] = {
    "gates": as_they_are,
    "gates uniform": lambda setup, case, mixture: mixture.adjusted(uniform),
    "gates random": lambda setup, case, mixture: mixture.adjusted(frozen_random(0)),
    "gates hardened": lambda setup, case, mixture: mixture.adjusted(hardened),
    "gates averaged": averaged,
}
BOUND_GATES = "bound gates"
MOVABLE: dict[str, Callable[[str, Weights], KnownMethod]] = {  # those whose strengths can be moved from subjects to styles
    "sum": weighted,
    **{method: partial(merged, method) for method in MERGES},
    "gates": trained,
}
METHODS: dict[str, KnownMethod] = {
    "base": base(),
    "alone": lambda setup: [alone(concept) for concept in setup.experts],
    "sum": summed(),
    "mean": mean(),
    "bound": bound(),
    "words only": words_only(),
    "tiles": in_tiles(),
    "grid search": lambda setup: [searched(setup.searched)],
    **{method: merged(method) for method in MERGES},
    **{name: trained(name, context=context) for name, context in CONTROLS.items()},
    BOUND_GATES: trained(BOUND_GATES, binding=from_files),
}


def imported(path: Path) -> ModuleType:
    """A Python file or package, imported from where it is.

    Raises ValueError if it cannot be found.
    """
    sys.path.insert(0, str(path.resolve().parent))
    try:
        return importlib.import_module(path.stem)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)


def methods_from(path: Path | None) -> dict[str, KnownMethod]:
    """The dict METHODS like that of this file, of a Python file or package, see `imported`; nothing without a path.

    Raises ValueError if it has none.
    """
    found = {} if path is None else getattr(imported(path), "METHODS", None)
    if not isinstance(found, dict):
        raise ValueError(f"{path} has no METHODS, a dict from names to methods")
    return found


def check_names(names: Sequence[str], known: Mapping[str, KnownMethod] = METHODS) -> None:
    """Raises ValueError for names that are not known."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown methods {unknown}; known: {list(known)}")


def chosen_methods(
    names: Sequence[str], setup: Setup, *, shares: Sequence[float] = (), known: Mapping[str, KnownMethod] = METHODS
) -> tuple[list[Method], list[str]]:
    """The methods of these names that can be drawn, and a sentence for each that cannot. "alone" is one method per expert.

    Args:
        shares: draw each method once per share s, with strength moved from subjects, at 2 - 2s, to styles, at 2s. Their
            names are like "sum @ 0.3", which `plots.frontier` reads.

    Raises ValueError for an unknown name, one whose strengths cannot be moved, or a share outside 0..1.
    """
    check_names(names, known)
    if shares and (fixed := [name for name in names if name not in MOVABLE]):
        raise ValueError(f"the strengths of {fixed} cannot be moved; those of {list(MOVABLE)} can")
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share must be from 0 to 1, got {wrong[0]}")
    found: list[Method] = []
    lacking: list[str] = []
    for name in names:
        try:
            entries = [MOVABLE[name](f"{name} @ {s:g}", by_role(2 - 2 * s, 2 * s)) for s in shares] or [known[name]]
            made = [method for entry in entries for method in ([entry] if isinstance(entry, Method) else entry(setup))]
            for method in made:
                method.needs(setup)
        except ValueError as error:
            lacking.append(f"{name!r} {error}")
        else:
            found += made
    return found, lacking
