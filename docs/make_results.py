"""Tables of success in the documents, from the verdicts in docs/results/ that the scripts of the world `--pack`.

    python docs/make_results.py

A table follows a line that says what is in it:
`<!-- success: SPLIT; ARM / ARM / ...; N seeds -->`, to which `; less ARM` or `; where ARM` may be added: less what that arm
has on the same compositions and seeds; on the compositions alone that it has.
`<!-- counts: SPLIT; ARM / ARM / ...; N seeds -->`: the same in numbers of pictures, a row per kind.
`<!-- robustness: KIND; AXIS, AXIS, ... -->`
`<!-- ladder: N, N, ... updates -->`
`<!-- styles: SPLIT; KIND -->`, to which `; of CONCEPT / CONCEPT / ...` may be added: the compositions with one of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from mole_diffusers.emoji.compositions import LARGER, TEST
from mole_diffusers.evaluation.tables import differences, grid_table, interval, markdown, success_table

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", *sorted(HERE.glob("*.md")))
TABLE = re.compile(r"<!-- (success|counts|robustness|ladder|styles): (.+?) -->\n\n((?:\|.*\n)*)")
RUNGS = {  # arm of the ladder -> what is free to learn
    "sum": "",
    "bound": "",
    "mole": "gates: a weight per LoRA and block",
    "static": "gates: a constant per LoRA and matrix",
    "flow": "gates: a weight per LoRA, block and token",
    "rank": "gates: a weight per rank and token",
    "factors": "gates: a constant per rank",
    "mixer": "a matrix between down and up",
    "A": "the LoRAs' down matrices",
    "A+B": "all matrices of the LoRAs",
    "tiles": "",
}
AXES = {"strangers": "LoRAs attached", "base_words": "subjects without a LoRA"}  # axis of robustness.py -> in a table
IN_WORDS = {  # kind of composition -> what a reader of the counts is told
    "subject x style": "one subject in a style",
    "two subjects + style": "two subjects in a style",
    "three subjects + style": "three subjects in a style",
    "contact": "two subjects that touch",
    "two subjects, close": "two subjects, with less room than the model is used to",
    "two subjects on paper": "two subjects on plain paper",
}
MARGINS = {"style margin": "style", "subject margin": "subject"}  # column of the ways for styles -> its name in a table


def verdicts(name: str) -> pd.DataFrame:
    """A row per picture, as `tables.as_frame` gives them."""
    rows = pd.read_csv(HERE / "results" / f"{name}.csv.gz", dtype={"setting": str}, keep_default_na=False)
    rows["success"] = rows["success"].astype(bool)
    case, group = rows["concepts"], rows["split" if "split" in rows else "kind"]
    return rows.assign(case=case, prompt=case, concepts=case.str.split("+"), composer=rows["arm"], group=group)


def in_order(rows: pd.DataFrame, arms: Iterable[str]) -> pd.DataFrame:
    """Rows by kind, by arm in the given order, by composition and by seed."""
    kinds, arms = [*TEST, *LARGER], list(arms)
    rows = rows.sort_values(["case", "seed"])
    return rows.sort_values(["kind", "arm"], key=lambda column: column.map([*kinds, *arms].index), kind="stable")


def success(asked: str) -> str:
    """Of arms on the compositions of a split; of the file "shared", a column per split."""
    split, names, count, *further = asked.split("; ")
    options = dict(option.split(" ", 1) for option in further)
    rows, arms, against = verdicts(split), names.split(" / "), options.get("less")
    if against:
        arms.insert(0, against)
    if unknown := set(arms) - set(rows["arm"]):
        raise ValueError(f"{split}.csv.gz has no arm {sorted(unknown)}, but {sorted(set(rows['arm']))}")
    nth = rows.groupby("group")["seed"].rank(method="dense")  # splits have other seeds
    rows = rows[rows["arm"].isin(arms) & (nth <= int(count.removesuffix(" seeds")))]
    if "where" in options:
        rows = rows[rows["case"].isin(rows.loc[rows["arm"] == options["where"], "case"])]
    rows = in_order(rows, arms)
    return success_table(rows, against=against)


def counts(asked: str) -> str:
    """Of arms on the compositions of a split: pictures with success, of how many, a row per kind."""
    split, names, count = asked.split("; ")
    rows, arms = verdicts(split), names.split(" / ")
    first = sorted(rows["seed"].unique())[: int(count.removesuffix(" seeds"))]
    rows = in_order(rows[rows["arm"].isin(arms) & rows["seed"].isin(first)], arms)
    body = []
    for kind, own in rows.groupby("kind", sort=False):
        right = [own.loc[own["arm"] == arm, "success"] for arm in arms]
        cells = [f"{each.sum()} of {len(each)}" if len(each) else "not drawn" for each in right]
        body.append([IN_WORDS.get(str(kind), str(kind)), str(own["case"].nunique()), *cells])
    return markdown(["the prompt asks for", "compositions", *arms], body)


def robustness(asked: str) -> str:
    """Of the arms on a kind of composition, along axes."""
    kind, axes = asked.split("; ")
    rows = verdicts("robustness")
    if unknown := set(axes.split(", ")) - set(rows.loc[rows["kind"] == kind, "axis"]):
        raise ValueError(f"robustness.csv.gz has no axis {sorted(unknown)} of {kind}")
    rows = rows[(rows["kind"] == kind) & rows["axis"].isin(axes.split(", "))]
    return grid_table(rows.replace({"axis": AXES}), ["axis", "setting"], "arm")


def ladder(asked: str) -> str:
    """By what is free to learn, a column per number of updates."""
    rows, columns = verdicts("ladder"), ["0", *asked.removesuffix(" updates").split(", ")]
    name = rows["arm"].str.partition(" @ ")
    rows = in_order(rows.assign(arm=name[0], updates=name[2].replace("", "0")), RUNGS)
    body = [
        [arm, RUNGS[arm], *(interval(own[own["updates"] == count], "success") for count in columns)]
        for arm, own in rows.groupby("arm", sort=False)
    ]
    return markdown(["arm", "free to learn", "untrained", *(f"{count} updates" for count in columns[1:])], body)


def styles(asked: str) -> str:
    """Of the ways that were tried for styles: success, the judge's margins, and both less those of bound LoRAs."""
    split, kind, *of = asked.split("; ")
    rows = verdicts("styles")
    rows = rows[(rows["split"] == split) & (rows["kind"] == kind)]
    if of:
        concepts = set(of[0].removeprefix("of ").split(" / "))
        rows = rows[[bool(concepts & set(names)) for names in rows["concepts"]]]
    rows = in_order(rows, rows["arm"].unique())
    less = differences(rows, "bound", list(MARGINS))
    body = []
    for name, own in rows.groupby("arm", sort=False):
        means = [f"{own[margin].mean():.1f}" for margin in MARGINS]
        changes = ["" if name == "bound" else interval(less[less["arm"] == name], margin, digits=1) for margin in MARGINS]
        body.append([name, interval(own, "success"), *means, *changes])
    return markdown(["way", "success", *MARGINS.values(), *(f"{name}, less bound" for name in MARGINS.values())], body)


def page(text: str) -> str:
    """A document with its tables made anew."""
    tables = {"success": success, "counts": counts, "robustness": robustness, "ladder": ladder, "styles": styles}

    def made(found: re.Match[str]) -> str:
        after = "" if found[3] else "\n"  # a table that was there has its empty line after it
        return f"<!-- {found[1]}: {found[2]} -->\n\n{tables[found[1]](found[2])}\n{after}"

    return TABLE.sub(made, text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
