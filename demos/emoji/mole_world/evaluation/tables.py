"""Tables of an evaluation: means with 95 % intervals by method, as markdown. Rows are a pandas table, one picture each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import nan
from typing import Any, Literal

import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from mole_world.evaluation import statistics
from mole_world.evaluation.rows import SAME_NOISE, Row

REFERENCE = " of the reference"  # end of the columns that `differences` keeps
Resample = Literal["cases", "concepts"]  # the units that `statistics.bootstrap` draws


def as_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a table, in their order, with three more columns.

    `composer` is the method, with "alone fox", "alone ink", .. joined as "alone". `attached` is the number of attached
    experts. `group` is the kind of case, with that number if some were idle: "pair, 4 LoRAs".
    """
    frame = pd.DataFrame(list(rows))
    frame["composer"] = frame["method"].mask(frame["method"].str.startswith("alone "), "alone")
    idle = frame["idle"].str.len()
    frame["attached"] = frame["concepts"].str.len() + idle
    frame["group"] = frame["kind"].mask(idle > 0, frame["kind"] + ", " + frame["attached"].astype(str) + " LoRAs")
    return frame


def concept_mean(values: pd.Series, concepts: Callable[[str], bool] = lambda _: True) -> pd.Series:
    """The mean over some concepts of a column of {concept: value}; NaN if a row has none of them."""

    def mean(found: dict[str, float]) -> float:
        kept = [value for concept, value in found.items() if concepts(concept)]
        return sum(kept) / len(kept) if kept else nan

    return values.map(mean)


def differences(rows: pd.DataFrame, against: str, values: Sequence[str]) -> pd.DataFrame:
    """The rows of other methods whose prompt and noise `against` has, too, with their values minus those of `against`."""
    is_reference = rows["method"] == against
    reference = rows.loc[is_reference, [*SAME_NOISE, *values]]
    pairs = rows[~is_reference].merge(reference, on=list(SAME_NOISE), suffixes=("", REFERENCE))
    for value in values:
        pairs[value] = pairs[value].astype(float) - pairs[value + REFERENCE].astype(float)
    return pairs


def estimate(rows: pd.DataFrame, value: str, *, resample: Resample = "cases") -> statistics.Estimate:
    """The mean of a column over cases and seeds, with its 95 % interval; also of a column from `differences`."""
    cases = dict(iter(rows.groupby("case", sort=False)))
    units = [[name] if resample == "cases" else case["concepts"].iloc[0] for name, case in cases.items()]
    values = [torch.tensor(case[value].astype(float).to_numpy()) for case in cases.values()]
    table = pad_sequence(values, batch_first=True, padding_value=nan)  # [G, S]
    return statistics.estimate(table, units, _kind(rows, value))


def _kind(rows: pd.DataFrame, value: str) -> statistics.Kind:
    """What a column holds: yes and no, the difference of two such columns, or other numbers."""
    reference = value + REFERENCE
    yes_and_no = rows[reference if reference in rows else value].map(lambda found: isinstance(found, bool)).all()
    return ("change" if reference in rows else "share") if yes_and_no else "measure"


def interval(rows: pd.DataFrame, value: str, *, digits: int = 2, resample: Resample = "cases") -> str:
    """`estimate` as "0.52 [0.28, 0.75]", over the rows that have the value; "-" if none does.

    A mean without an interval has the number of its cases: "0.52 (n = 1)".
    """
    rows = rows.dropna(subset=[value])
    if rows.empty:
        return "-"
    mean, low, high = (f"{number:.{digits}f}" for number in estimate(rows, value, resample=resample))
    return f"{mean} (n = {rows['case'].nunique()})" if low == "nan" else f"{mean} [{low}, {high}]"


def verdict(rows: pd.DataFrame, value: str, better: Literal["higher", "lower"]) -> str:
    """What may be said of a column from `differences`: "better", "worse", "no difference shown", or "too few cases"."""
    rows = rows.dropna(subset=[value])
    if rows["case"].nunique() < statistics.ENOUGH:
        return "too few cases"
    _, low, high = estimate(rows, value)
    if not (low > 0 or high < 0):
        return "no difference shown"
    return "better" if (better == "lower") == (high < 0) else "worse"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def success_table(rows: pd.DataFrame, *, against: str | None = None, resample: Resample = "cases") -> str:
    """Success of every method, a column per kind of case; with `against`, `differences` from that method."""
    rows, head = (differences(rows, against, ["success"]), f"method, less {against}") if against else (rows, "method")
    return grid_table(rows.assign(**{head: rows["composer"]}), [head], "group", resample=resample)


def grid_table(rows: pd.DataFrame, down: Sequence[str], across: str, *, resample: Resample = "cases") -> str:
    """Success for all values of the columns `down` that occur together, a column per value of the column `across`."""
    columns = list(rows[across].unique())
    body = [
        [*map(str, at), *(interval(own[own[across] == column], "success", resample=resample) for column in columns)]
        for at, own in rows.groupby(list(down), sort=False)
    ]
    return markdown([*down, *columns], body)


def score_table(
    rows: pd.DataFrame,
    scores: Sequence[str],
    *,
    against: str | None = None,
    head: str = "method",
    digits: int = 3,
    resample: Resample = "cases",
) -> str:
    """Every method, a column per score; with `against`, `differences` from that method."""
    rows, head = (differences(rows, against, scores), f"{head}, less {against}") if against else (rows, head)
    body = [
        [method, *(interval(own, score, digits=digits, resample=resample) for score in scores)]
        for method, own in rows.groupby("composer", sort=False)
    ]
    return markdown([head, *scores], body)


def by_kind(rows: pd.DataFrame, scores: Sequence[str], **options: Any) -> str:
    """`score_table` for every kind of case, under its name; for a single kind only the table."""
    tables = {kind: score_table(own, scores, **options) for kind, own in rows.groupby("group", sort=False)}
    return "\n\n".join(f"{kind}:\n\n{text}" if len(tables) > 1 else text for kind, text in tables.items())
