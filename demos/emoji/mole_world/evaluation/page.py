"""The page of an evaluation: what was measured, with intervals and what may be said of it, next to the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd

from mole_diffusers.whole_files import write_text
from mole_world.evaluation.report import EvaluationReport
from mole_world.evaluation.rows import Row, picture_path
from mole_world.evaluation.statistics import ENOUGH
from mole_world.evaluation.tables import differences, interval, verdict

NAME = "index.html"
SHOWN = 3  # prompts of each kind that have their pictures on the page
SEEDS = 2  # pictures of each


def write_page(folder: Path, rows: Sequence[Row], report: EvaluationReport, about: Mapping[str, Any]) -> Path:
    """Write the page next to the rows and pictures; the same rows make the same page. Returns its path.

    Args:
        about: what measured the pictures, for the page's head.
    """
    frame = report.frame(rows)
    values = [value for value in report.values if frame[value].notna().any()]
    judged = {value: better for value, better in report.judged.items() if value in values}
    kinds = [_kind(folder, own, values, judged) for _, own in frame.groupby("group", sort=False)]
    templates = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = templates.from_string(Path(__file__).with_suffix(".html").read_text("utf-8"))
    base, counts = rows[0]["settings"]["base"], f"{_counts(frame)} and {frame['method'].nunique()} methods"
    text = template.render(base=base, counts=counts, about=about, enough=ENOUGH, kinds=kinds, values=values, judged=judged)
    write_text(folder / NAME, text)
    return folder / NAME


def _counts(frame: pd.DataFrame) -> str:
    cases = frame[["kind", "case", "prompt"]].drop_duplicates()
    return f"{len(frame)} pictures of {len(cases)} cases with {frame['seed'].nunique()} seeds"


def _kind(folder: Path, rows: pd.DataFrame, values: Sequence[str], judged: Mapping[str, Any]) -> dict[str, Any]:
    """One kind of case: tables by method, and the pictures of its first prompts."""
    less = differences(rows, "sum", list(judged)) if (rows["method"] == "sum").any() else rows[:0]
    return {
        "name": rows["group"].iloc[0],
        "counts": _counts(rows),
        "means": [
            (method, [interval(own, value, digits=3) for value in values])
            for method, own in rows.groupby("composer", sort=False)
        ],
        "less": [
            (method, [(interval(own, value, digits=3), verdict(own, value, better)) for value, better in judged.items()])
            for method, own in less.groupby("composer", sort=False)
        ],
        "pictures": [_pictures(folder, own) for _, own in list(rows.groupby("prompt", sort=False))[:SHOWN]],
    }


def _pictures(folder: Path, rows: pd.DataFrame) -> dict[str, Any]:
    """The pictures of one prompt, by method."""
    methods = []
    for method, own in rows.groupby("method", sort=False):
        paths = [picture_path(folder, row).relative_to(folder) for row in own.to_dict("records")[:SEEDS]]
        methods.append((method, [quote(path.as_posix()) for path in paths]))
    return {"prompt": rows["prompt"].iloc[0], "methods": methods}
