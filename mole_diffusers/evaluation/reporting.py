"""What is shown of an evaluation: the tables and figures of each protocol."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, Protocol

from mole_diffusers import emoji
from mole_diffusers.evaluation.plots import Limits, against_count, bars, frontier
from mole_diffusers.evaluation.rows import Row
from mole_diffusers.evaluation.tables import (
    SCORES,
    SEEN,
    SUCCESS,
    Resampled,
    Value,
    by_kind,
    cases_of,
    concept_table,
    concepts_of,
    dino_by_role,
    paired_scores,
    paired_table,
    score_table,
    success_table,
)

Table = Callable[[Sequence[Row]], str]


class Less(Protocol):
    """A table of every other arm less one."""

    def __call__(self, rows: Sequence[Row], against: str, *, resampled: Resampled = cases_of) -> str: ...


@dataclass(frozen=True)
class Report:
    """What a protocol's rows are shown by.

    Attributes:
        tables: of all arms.
        less: of every other arm less one, by its name.
        values: name -> what bars show.
        roles: name -> what the frontier shows, of subjects and of styles.
        count: name -> what is drawn against the number of experts.
        limits: of the figures' axes.
        styles: the concepts that are styles.
    """

    tables: Sequence[Table]
    less: Less
    values: Mapping[str, Value]
    roles: Mapping[str, Value]
    count: Mapping[str, Value]
    limits: Limits
    styles: Collection[str]

    def text(self, rows: Sequence[Row]) -> str:
        """The tables, and where there is a sum every other arm less it, with cases and with concepts resampled."""
        parts = [table(rows) for table in self.tables]
        if any(row["arm"] == "sum" for row in rows):
            drawn = "With concepts drawn in the place of the cases that share them, which errs on the wide side:"
            parts += [self.less(rows, "sum"), drawn, self.less(rows, "sum", resampled=concepts_of)]
        return "\n\n".join(parts)

    def draw_bars(self, rows: Sequence[Row], path: Path) -> Any:
        """Of the values that any row has."""
        measured = {name: value for name, value in self.values.items() if _with(rows, [value])}
        return bars(rows, path, measured, limits=self.limits)

    def draw_count(self, rows: Sequence[Row], path: Path) -> Any:
        """Raises ValueError where no row has the value."""
        shown = _with(rows, self.count.values())
        if not shown:
            raise ValueError(f"no picture has {' or '.join(self.count)}")
        return against_count(shown, path, self.count, limits=self.limits)

    def draw_frontier(self, rows: Sequence[Row], path: Path) -> Any:
        """Of the cases that ask for a subject and a style.

        Raises ValueError where no row of theirs has both values.
        """
        both = [row for row in rows if len({concept in self.styles for concept in row["concepts"]}) == 2]
        shown = _with(both, self.roles.values())
        if not shown:
            raise ValueError(f"no picture asks for both a subject and a style and has {' and '.join(self.roles)}")
        return frontier(shown, path, self.roles, limits=self.limits)


def _with(rows: Sequence[Row], values: Iterable[Value]) -> list[Row]:
    """The rows that have all of some values."""
    asked = list(values)
    return [row for row in rows if not any(isnan(value(row)) for value in asked)]


EMOJI = Report(
    tables=(success_table, partial(by_kind, table=concept_table)),
    less=paired_table,
    values=SUCCESS,
    roles=SEEN,
    count=SUCCESS,
    limits=(0, 1),
    styles=emoji.STYLES,
)


def _scores_less(rows: Sequence[Row], against: str, *, resampled: Resampled = cases_of) -> str:
    return by_kind(rows, partial(paired_scores, against=against, resampled=resampled))


def of_scores(styles: Collection[str]) -> Report:
    """Of a real checkpoint, where nothing says success: scores in its place."""
    return Report(
        tables=(partial(by_kind, table=score_table),),
        less=_scores_less,
        values=SCORES,
        roles=dino_by_role(styles),
        count={"DINO": SCORES["DINO"]},
        limits=(None, None),
        styles=styles,
    )
