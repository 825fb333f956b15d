"""Keep verdicts for the documents: docs/results/NAME.csv.gz, from which docs/make_results.py makes the tables."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parents[3] / "docs" / "results"


def pack(name: str, rows: pd.DataFrame, request: Sequence[str], *, measured: Sequence[str] = ("success",)) -> None:
    """Add rows, one per picture, to a file. They replace those of the same request.

    Args:
        request: the columns that make a row unique.
        measured: the columns of what was measured.
    """
    path, columns = FOLDER / f"{name}.csv.gz", [*request, *measured]
    found = rows.assign(concepts=rows["concepts"].str.join("+"), success=rows["success"].astype(int))[columns]
    if path.exists():
        found = pd.concat([pd.read_csv(path, dtype={"setting": str}, keep_default_na=False), found])
    found = found.drop_duplicates(list(request), keep="last")
    found.to_csv(path, index=False, compression={"method": "gzip", "mtime": 0})
