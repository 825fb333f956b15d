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
from mole_diffusers.merging.merge import METHODS

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
