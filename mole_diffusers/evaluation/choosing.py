"""Arms by name: which there are, and those that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mole_diffusers.evaluation.arms import (
    CONTROLS,
    alone,
    base,
    by_role,
    composite,
    gated,
    gates_of,
    klora,
    mean,
    merged,
    searched,
    summed,
    switch,
    weighted,
)
from mole_diffusers.evaluation.runner import Arm, Bench
from mole_diffusers.evaluation.runtime import by_expert
from mole_diffusers.merging.merge import METHODS, by_activations

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
    """The named arms.

    Args:
        gates: a folder with one folder of trained gates per case, "fox+ink".
        weights: what a search found, see `searched`.

    Raises ValueError for a name that is not one, or an arm that cannot be drawn, see `obstacles`.
    """
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"unknown arms {unknown}; known: {list(ARMS)}")
    if found := obstacles(names, bench, gates, weights=weights):
        raise ValueError("; ".join(found.values()))
    arms = []
    for name in names:
        if name == "alone":
            arms += [alone(concept) for concept in bench.experts]
        elif name == "grid search" and weights is not None:
            arms.append(searched(weights))
        elif name in CONTROLS and gates is not None:
            arms.append(gated(name, gates_of(gates), inside=CONTROLS[name]))
        else:
            arms.append(PLAIN[name]() if name in PLAIN else merged(name))
    return arms


def obstacles(
    names: Sequence[str],
    bench: Bench,
    gates: Path | None = None,
    *,
    weights: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, str]:
    """Those of the named arms that this bench cannot draw -> why, known before anything is drawn."""
    silent = sorted(name for name in bench.experts if not bench.prompts.get(name))
    kind, found = type(bench.pipe).__name__, {}
    for name in names:
        if name in METHODS and by_activations(name) and silent:
            found[name] = f"{name!r} runs every expert on prompts of its own, and there are none for {silent}"
        elif name in ("switch", "composite") and not by_expert(bench.pipe):
            found[name] = f"{name!r} needs a unet and one text encoder, unlike {kind}"
        elif name == "k-lora" and getattr(bench.pipe, "unet", None) is None:
            found[name] = f"{name!r} needs a unet, unlike {kind}"
        elif name == "grid search" and weights is None:
            found[name] = f"{name!r} needs the weights of a search"
        elif name in CONTROLS and gates is None:
            found[name] = f"{name!r} needs a folder of trained gates"
    return found


def moved(names: Sequence[str], bench: Bench, gates: Path | None = None, *, shares: Sequence[float]) -> list[Arm]:
    """Sums, merges and gates as the user's strength moves from subjects to styles: 2 - 2s and 2s at a share s.

    They are named "sum @ 0.3", as `plots.frontier` reads them.

    Raises ValueError for an arm whose strengths cannot be moved or that cannot be drawn, or a share outside 0..1.
    """
    known = ["sum", *MERGES, "gates"]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the strengths of {unknown} cannot be moved; those of {known} can")
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share must be from 0 to 1, got {wrong[0]}")
    if found := obstacles(names, bench, gates):
        raise ValueError("; ".join(found.values()))
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
