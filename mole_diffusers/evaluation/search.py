"""Grid search of strengths on a validation split: the arms to draw, and the best of them by kind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from mole_diffusers.evaluation.arms import by_role, weighted
from mole_diffusers.evaluation.rows import Row
from mole_diffusers.evaluation.runner import Arm, Bench
from mole_diffusers.evaluation.tables import by

ROLES = ("subject", "style")
VALUES = (0.5, 0.7, 0.9, 1.1, 1.3)


def grid(bench: Bench, values: Sequence[float] = VALUES) -> list[Arm]:
    """A weighted sum for every pair of strengths, one for subjects and one for styles.

    Cases without a style are drawn once per subject strength.
    """
    arms = []
    for subject in values:
        for style in values:
            arm = weighted(f"sum ({subject:g}, {style:g})", by_role(subject, style), subject=subject, style=style)
            first = style == values[0]
            covers = lambda case, first=first: first or bool(bench.styles & set(case.experts))  # noqa: E731
            arms.append(replace(arm, covers=covers))
    return arms


def read_weights(path: Path) -> dict[str, dict[str, float]]:
    """Strengths by kind of case, as `best_weights` gives them, from JSON: {"pair": {"subject": 0.9, "style": 1.1}}.

    Raises ValueError where the file holds something else.
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


def best_weights(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Kind -> the strengths with the highest success; among equals, the most concepts seen, then the nearest to 1.

    Raises ValueError where no row is of a search.
    """
    found: dict[str, dict[str, float]] = {}
    tried = [row for row in rows if set(ROLES) <= set(row["settings"])]
    if not tried:
        raise ValueError("no rows of a grid search; draw the arms of `grid` on a validation split first")
    for kind, group in by(tried, "kind").items():
        found[kind] = max((_scored(arm) for arm in by(group, "arm").values()), key=lambda scored: scored[0])[1]
    return found


def _scored(rows: Sequence[Row]) -> tuple[tuple[float, float, float], dict[str, float]]:
    strengths = {role: float(rows[0]["settings"][role]) for role in ROLES}
    success = sum(r["success"] for r in rows) / len(rows)
    seen = sum(_share(r["seen"]) for r in rows) / len(rows)
    return (success, seen, -sum(abs(value - 1) for value in strengths.values())), strengths


def _share(seen: Mapping[str, bool]) -> float:
    return sum(seen.values()) / len(seen)
