"""Grid search of strengths on a validation split: the methods to draw, and the best of them for each kind of case."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd

from mole_diffusers.safe_files import read_json
from mole_world.evaluation.methods import by_role, weighted
from mole_world.evaluation.rows import Row
from mole_world.evaluation.runner import Case, Method, Setup

ROLES = ("subject", "style")
VALUES = (0.5, 0.7, 0.9, 1.1, 1.3)


def search_methods(setup: Setup, values: Sequence[float] = VALUES) -> list[Method]:
    """A weighted sum for every pair of strengths, one for subjects and one for styles.

    Cases without a style are drawn once per subject strength.
    """

    def has_style(case: Case) -> bool:
        return bool(setup.styles & set(case.experts))

    methods = []
    for subject, style in product(values, values):
        method = weighted(f"sum ({subject:g}, {style:g})", by_role(subject, style), subject=subject, style=style)
        methods.append(method if style == values[0] else replace(method, covers=has_style))
    return methods


def best_weights(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Kind of case -> the strengths with the highest success. Ties go to most concepts seen, then to the strengths
    nearest to 1.

    Raises ValueError if no row is from a search.
    """
    tried = [row for row in rows if set(ROLES) <= set(row["settings"])]
    if not tried:
        raise ValueError("no rows of a grid search; draw the methods of `search_methods` on a validation split first")
    scores = pd.DataFrame(
        {role: float(row["settings"][role]) for role in ROLES}
        | {"kind": row["kind"], "success": row["success"], "seen": sum(row["seen"].values()) / len(row["seen"])}
        for row in tried
    )
    means = scores.groupby(["kind", *ROLES], sort=False).mean().reset_index()
    means["distance"] = (means[list(ROLES)] - 1).abs().sum(axis=1)
    ranked = means.sort_values(["success", "seen", "distance"], ascending=[False, False, True], kind="stable")
    best = ranked.drop_duplicates("kind").set_index("kind").loc[means["kind"].unique(), list(ROLES)]
    return best.to_dict("index")


def read_weights(path: Path) -> dict[str, dict[str, float]]:
    """Strengths by kind of case, as from `best_weights`, in JSON: {"pair": {"subject": 0.9, "style": 1.1}}.

    Raises ValueError if the file holds anything else.
    """
    form, found = f'{path}: not {{"KIND": {{"subject": STRENGTH, "style": STRENGTH}}, ..}}', read_json(path)
    if not isinstance(found, dict) or not found:
        raise ValueError(form)
    for kind, strengths in found.items():
        if not isinstance(strengths, dict) or {*strengths} != {*ROLES} or {*map(type, strengths.values())} - {int, float}:
            raise ValueError(f"{form}: {kind!r} has {json.dumps(strengths)}")
    return found
