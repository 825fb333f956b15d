"""The report of an evaluation: tables and figures of a protocol's rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mole_world.evaluation.plots import Limits, bars, curves, frontier
from mole_world.evaluation.rows import Row
from mole_world.evaluation.statistics import ENOUGH


@dataclass(frozen=True)
class EvaluationReport:
    """How a protocol's rows are shown. Values are columns of the table that `frame` makes.

    Attributes:
        frame: rows as a table with the protocol's values.
        tables: of all methods. The first one also takes `against`, a method to subtract, and `resample`.
        values: shown as bars and on the page.
        judged: value -> "higher" or "lower", whichever is better.
        counted: the value that is drawn against the number of experts.
        roles: shown in the frontier, for subjects and for styles.
        limits: of the figures' axes.
        styles: the concepts that are styles.
    """

    frame: Callable[[Sequence[Row]], pd.DataFrame]
    tables: Sequence[Callable[..., str]]
    values: Sequence[str]
    judged: Mapping[str, Literal["higher", "lower"]]
    counted: str
    roles: tuple[str, str]
    limits: Limits
    styles: Collection[str]

    def text(self, rows: Sequence[Row]) -> str:
        """The tables. If there is a plain sum, also every other method less it, resampling cases and resampling concepts."""
        frame = self.frame(rows)
        parts = [table(frame) for table in self.tables]
        if (frame["method"] == "sum").any():
            by_concepts = "With concepts drawn in the place of the cases that share them, which errs on the wide side:"
            less = partial(self.tables[0], frame, against="sum")
            parts += [less(), by_concepts, less(resample="concepts")]
            counts = frame.groupby("group", sort=False)["case"].nunique()
            if few := [f"{kind} ({count})" for kind, count in counts.items() if count < ENOUGH]:
                parts.append(f"Too few cases to call any method better, which takes {ENOUGH}: {', '.join(few)}.")
        return "\n\n".join(parts)

    def draw_bars(self, rows: Sequence[Row], path: Path) -> Any:
        """Bars of the values that any row has."""
        frame = self.frame(rows)
        return bars(frame, path, [value for value in self.values if frame[value].notna().any()], limits=self.limits)

    def draw_count(self, rows: Sequence[Row], path: Path) -> Any:
        """`counted` against the number of attached experts.

        Raises ValueError if no row has the value.
        """
        shown = self.frame(rows).dropna(subset=[self.counted])
        if shown.empty:
            raise ValueError(f"no picture has {self.counted}")
        return curves(shown, path, self.counted, at="attached", limits=self.limits)

    def draw_frontier(self, rows: Sequence[Row], path: Path) -> Any:
        """Styles against subjects, for the cases that have both.

        Raises ValueError if no row of theirs has both values.
        """
        frame = self.frame(rows)
        both = frame["concepts"].map(lambda concepts: len({concept in self.styles for concept in concepts}) == 2)
        shown = frame[both].dropna(subset=list(self.roles))
        if shown.empty:
            raise ValueError(f"no picture asks for both a subject and a style and has {' and '.join(self.roles)}")
        return frontier(shown, path, self.roles, limits=self.limits)
