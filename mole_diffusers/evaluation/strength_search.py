"""Grid search of strengths on a validation split: the arms to draw, and the best of them for each kind of case."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

from mole_diffusers.evaluation.arms import by_role, weighted
from mole_diffusers.evaluation.rows import Row
from mole_diffusers.evaluation.runner import Arm, Setup

ROLES = ("subject", "style")
VALUES = (0.5, 0.7, 0.9, 1.1, 1.3)


def search_arms(setup: Setup, values: Sequence[float] = VALUES) -> list[Arm]:
    """A weighted sum for every pair of strengths, one for subjects and one for styles.

    Cases without a style are drawn once per subject strength.
    """
    arms = []
    for subject, style in product(values, values):
        arm = weighted(f"sum ({subject:g}, {style:g})", by_role(subject, style), subject=subject, style=style)
        first = style == values[0]
        covers = lambda case, first=first: first or bool(setup.styles & set(case.experts))  # noqa: E731
        arms.append(replace(arm, covers=covers))
    return arms


def best_weights(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Kind of case -> the strengths with the highest success; among equals most concepts seen, then nearest to 1.

    Raises ValueError if no row is of a search.
    """
    import pandas as pd

    tried = [row for row in rows if set(ROLES) <= set(row["settings"])]
    if not tried:
        raise ValueError("no rows of a grid search; draw the arms of `search_arms` on a validation split first")
    scores = pd.DataFrame(
        {
            **{name: [row[name] for row in tried] for name in ("kind", "success")},
            **{role: [float(row["settings"][role]) for row in tried] for role in ROLES},
            "seen": [sum(row["seen"].values()) / len(row["seen"]) for row in tried],
        }
    )
    means = scores.groupby(["kind", *ROLES], sort=False).mean().reset_index()
    means["distance"] = (means[list(ROLES)] - 1).abs().sum(axis=1)
    ranked = means.sort_values(["success", "seen", "distance"], ascending=[False, False, True], kind="stable")
    best = ranked.drop_duplicates("kind").set_index("kind").loc[means["kind"].unique(), list(ROLES)]
    return best.to_dict("index")


def read_weights(path: Path) -> dict[str, dict[str, float]]:
    """Strengths by kind of case, as from `best_weights`, in JSON: {"pair": {"subject": 0.9, "style": 1.1}}.

    Raises ValueError if the file holds something else.
    """
    form = 'not {"KIND": {"subject": STRENGTH, "style": STRENGTH}, ..}'
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {form}: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: {form}")
    for kind, strengths in found.items():
        if not isinstance(strengths, dict) or set(strengths) != set(ROLES) or not all(map(_is_strength, strengths.values())):
            raise ValueError(f"{path}: {form}: {kind!r} has {json.dumps(strengths)}")
    return found


def _is_strength(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
