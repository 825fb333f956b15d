"""Tables of success in the documents, from the verdicts in docs/results/ that the scripts of the world `--pack`.

    python docs/make_results.py

A table follows a line that says what is in it:
`<!-- success: SPLIT; ARM / ARM / ...; N seeds -->`, to which `; less ARM` or `; where ARM` may be added: less what that arm
has on the same compositions and seeds; on the compositions alone that it has.
`<!-- robustness: KIND; AXIS, AXIS, ... -->`
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from mole_diffusers.emoji.compositions import LARGER, TEST
from mole_diffusers.evaluation.tables import grid_table, paired_table, success_table

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", *sorted(HERE.glob("*.md")))
TABLE = re.compile(r"<!-- (success|robustness): (.+?) -->\n\n((?:\|.*\n)*)")


def verdicts(name: str) -> pd.DataFrame:
    """A row per picture, as `tables.as_frame` gives them."""
    rows = pd.read_csv(HERE / "results" / f"{name}.csv.gz", dtype={"setting": str}, keep_default_na=False)
    case = rows["concepts"]
    return rows.assign(case=case, prompt=case, concepts=case.str.split("+"), composer=rows["arm"], group=rows["kind"])


def success(asked: str) -> str:
    """Of arms on the compositions of a split."""
    split, names, count, *further = asked.split("; ")
    options = dict(option.split(" ", 1) for option in further)
    rows, arms, against = verdicts(split), names.split(" / "), options.get("less")
    if against:
        arms.insert(0, against)
    if unknown := set(arms) - set(rows["arm"]):
        raise ValueError(f"{split}.csv.gz has no arm {sorted(unknown)}, but {sorted(set(rows['arm']))}")
    seeds = sorted(rows["seed"].unique())[: int(count.removesuffix(" seeds"))]
    rows = rows[rows["arm"].isin(arms) & rows["seed"].isin(seeds)]
    if "where" in options:
        rows = rows[rows["case"].isin(rows.loc[rows["arm"] == options["where"], "case"])]
    rows = rows.sort_values(["kind", "arm"], key=lambda column: column.map([*TEST, *LARGER, *arms].index), kind="stable")
    return paired_table(rows, against) if against else success_table(rows)


def robustness(asked: str) -> str:
    """Of the arms on a kind of composition, along axes."""
    kind, axes = asked.split("; ")
    rows = verdicts("robustness")
    if unknown := set(axes.split(", ")) - set(rows.loc[rows["kind"] == kind, "axis"]):
        raise ValueError(f"robustness.csv.gz has no axis {sorted(unknown)} of {kind}")
    return grid_table(rows[(rows["kind"] == kind) & rows["axis"].isin(axes.split(", "))], ["axis", "setting"], "arm")


def page(text: str) -> str:
    """A document with its tables made anew."""
    tables = {"success": success, "robustness": robustness}
    return TABLE.sub(lambda found: f"<!-- {found[1]}: {found[2]} -->\n\n{tables[found[1]](found[2])}\n", text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
