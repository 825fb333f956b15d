"""A sheet on which people, or a model that sees, choose blindly between pictures of two methods, in both orders."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import krippendorff
import pandas as pd
import torch

from mole_diffusers.inspection import image_grid
from mole_world.evaluation.rows import SAME_NOISE, Row, picture_of, save_picture
from mole_world.evaluation.tables import interval, markdown

ANSWERS = ("left", "right", "same")
COLUMNS = ("first method", "second method", "first better", "second better", "same", "share of the first", "orders agree")


def write_sheet(folder: Path, rows: Sequence[Row]) -> int:
    """Write pairs of methods on the same prompt and noise, each in both orders: sheet/NNNN.png, answers.csv to fill in,
    key.json.

    Returns the number of questions. Only key.json names the methods, so you can give away the rest. Each judge fills in a
    copy, answers-NAME.csv, beside or instead of answers.csv.

    Raises ValueError for rows of only one method, or if there already is a sheet with answers.
    """
    if any(answer for path in (folder / "sheet").glob("answers*.csv") for _, answer in _answers(path)):
        raise ValueError(f"{folder / 'sheet'} holds answers: count them with --judged, or move it before a new one is made")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SAME_NOISE), []).append(row)
    pairs = [pair for group in groups.values() for pair in permutations(group, 2)]
    if not pairs:
        raise ValueError("a sheet needs two methods or more")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    questions: list[dict[str, Any]] = []
    for number, (left, right) in enumerate(pairs[i] for i in order):
        pictures = [picture_of(folder, row) for row in (left, right)]
        save_picture(image_grid([pictures], ["left", "right"], [""], cell=256), folder / "sheet" / f"{number:04}.png")
        questions.append({name: left[name] for name in SAME_NOISE} | {"left": left["method"], "right": right["method"]})
    with (folder / "sheet" / "answers.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "prompt", "better: left, right or same"])
        writer.writerows([f"{n:04}", question["prompt"], ""] for n, question in enumerate(questions))
    (folder / "sheet" / "key.json").write_text(json.dumps(questions, indent=1) + "\n")
    return len(questions)


def count_answers(folder: Path) -> str:
    """`votes` as a table, "-" for None, with the agreement of the judges below if there are several."""
    rows = [
        [*map(str, counts), share or "-", "-" if agree is None else f"{agree:.2f}"]
        for *counts, share, agree in map(dict.values, votes(folder))
    ]
    text, alpha = markdown(COLUMNS, rows), agreement(folder)
    said = "Agreement of the judges by Krippendorff's alpha (1: full, 0: as by chance):"
    return text if alpha is None else f"{text}\n\n{said} {alpha:.2f}"


def votes(folder: Path) -> list[dict[str, Any]]:
    """The answers of all judges on a sheet: `COLUMNS` for each pair of methods.

    These say how often each method was better, the share of the first among these with its interval over cases, and how
    often both orders of the same two pictures got the same answer of a judge; None if there are no such answers.

    Raises ValueError for an answer that is not in `ANSWERS`, and for a table that is not the sheet's.
    """
    counted = []
    for methods, own in _asked(folder).dropna(subset=["better"]).groupby("methods", sort=False):
        twice = [pair for _, pair in own.groupby(["judge", *SAME_NOISE])["better"] if len(pair) == 2]
        agree = sum(pair.nunique() == 1 for pair in twice) / len(twice) if twice else None
        counts = [int((own["better"] == better).sum()) for better in (*methods, "same")]
        decided = own[own["better"] != "same"]
        share = interval(decided.assign(first=decided["better"] == methods[0]), "first") if len(decided) else None
        counted.append(dict(zip(COLUMNS, [*methods, *counts, share, agree], strict=True)))
    return counted


def agreement(folder: Path) -> float | None:
    """Krippendorff's alpha (2011) of the judges' choices between methods; None for one judge, or if all answers are equal.

    A question is a unit. Judges may leave out questions.
    """
    asked = _asked(folder)
    codes, named = pd.factorize(asked["better"])  # -1 for no answer
    table = asked.assign(code=codes).pivot(index="judge", columns="question", values="code")
    if len(table) < 2 or len(named) < 2:
        return None
    return float(krippendorff.alpha(table.where(table >= 0).to_numpy(), level_of_measurement="nominal"))


def _asked(folder: Path) -> pd.DataFrame:
    """Every question for every judge, with its two methods and the better of them, "same", or None if unanswered."""
    questions = json.loads((folder / "sheet" / "key.json").read_text())
    found = []
    for path in sorted((folder / "sheet").glob("answers*.csv")):
        answers = _answers(path)
        if [number for number, _ in answers] != list(range(len(questions))):
            raise ValueError(
                f"{path.name} is to have a row for each question from 0000 to {len(questions) - 1:04}, each once"
            )
        for (number, answer), question in zip(answers, questions, strict=True):
            if answer not in (*ANSWERS, ""):
                raise ValueError(f"{path.name}, question {number:04}: {answer!r} is none of {list(ANSWERS)}")
            methods = tuple(sorted((question["left"], question["right"])))
            better = question.get(answer, "same") if answer else None
            found.append(question | {"judge": path.stem, "question": number, "methods": methods, "better": better})
    return pd.DataFrame(found)


def _answers(path: Path) -> list[tuple[int, str]]:
    """The numbers of a sheet's questions, each with its answer or ""; the table may have them in any order."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if wrong := next((row for row in rows[1:] if len(row) < 3 or not row[0].strip().isdecimal()), None):
        raise ValueError(f"{path.name}: {wrong} is not question, prompt and answer, with commas between them")
    return sorted((int(row[0]), row[2].strip().lower()) for row in rows[1:])
