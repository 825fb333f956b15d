"""Tables of success in the documents, and the numbers of some sentences, from the verdicts in docs/results/ that the scripts
of the world `--pack`.

    python docs/make_results.py

A table follows a line that says what is in it:
`<!-- success: SPLIT; METHOD / METHOD / ...; N seeds -->`, with "others" for all of `OTHERS`. It may go on with
`; less METHOD`: less what that method has on the same compositions and seeds, or `; shared`: of the compositions alone that
all of these have.
`<!-- counts: SPLIT; METHOD / METHOD / ...; N seeds -->`: the same in numbers of pictures, a row per kind.
`<!-- kinds: SPLIT; METHOD / METHOD / ...; N seeds -->`: the shares, a row per kind, and how many successes of the
last method also show a subject that nobody asked for.
`<!-- ladder: N, N, ... updates -->`
`<!-- wordings: METHOD / METHOD / ... -->`: by how the prompt says it.
`<!-- joint: METHOD / METHOD -->`: one LoRA for all subjects, by composition, rank and updates.

`SENTENCES` are those whose numbers are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from mole_world.compositions import LARGER, TEST
from mole_world.evaluation.statistics import wilson
from mole_world.evaluation.tables import interval, markdown, success_table

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", *sorted(HERE.glob("*.md")))
TABLE = re.compile(r"<!-- (success|counts|kinds|ladder|wordings|joint): (.+?) -->\n\n((?:\|.*\n)*)")
RUNGS = {  # method of the ladder -> what is free to learn
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
IN_WORDS = {  # kind of composition -> what a reader of the counts is told
    "subject x style": "one subject in a style",
    "two subjects + style": "two subjects in a style",
    "three subjects + style": "three subjects in a style",
    "contact": "two subjects that touch",
    "two subjects, close": "two subjects with little room",
    "two subjects on paper": "two subjects on a plain background",
}
TRAINED = {family: f"tiles, {family} gates" for family in ("mole", "factors", "flow")}
WORDINGS = {  # setting of robustness.py -> what a reader is told; all others are forms of the base's captions
    "other words": "words that no caption has",
    "other order": "the subjects in the other order",
    "places said": "with their places",
}
TOLD_THE_PROMPT = (
    *("freefuse", "masked blend", "regmean", "ssr", "ties", "np"),
    *("switch", "w-switch, short turns", "w-composite", "composite", "svd", "loratorio, sharp"),
)
TOLD_THE_PLACES = (
    "masked blend, given places",
    "masked blend, given places, tiles' steps",
    "regional prompts",
    "isolation until half",
)
OTHERS = (
    *TOLD_THE_PROMPT,
    *("loratorio", "tiles from the first step", "words and given places"),
    *TOLD_THE_PLACES,
    "bound, isolation until half",
)
SENTENCES = (
    "of the right ones of two subjects in tiles, {two_more} of {tiles} show one subject more.",
    "tiles were right in {reworded} of {of_reworded}, the base with subjects that it knows in {known}.",
    "are right in {hard} of {of_hard} pictures, three in {three} of {of_three}.",
    "Of these {all_hard} right ones, {with_more} also show",
    "Of {others} that are told the prompt alone",
    "FreeFuse, is right in {freefuse} of {pictures} pictures of two subjects, tiles in {tiles}",
    "the best is right in {told} of {cases}, our binding in {told_ours}",
    "right in {freefuse} of {pictures}, tiles in {tiles}. Tiles alone are right in {won} pictures, FreeFuse alone in {lost}",
    "right in {mole} of {of_gates} pictures, tiles alone in {none}, two other gate types in {factors} and {flow}.",
    "the sum is right in {sum_1} of {cases}, bound in {bound_1}, FreeFuse in {freefuse_1} and tiles in {tiles_1}",
)


def verdicts(name: str) -> pd.DataFrame:
    """A row per picture, as `tables.as_frame` gives them."""
    rows = pd.read_csv(HERE / "results" / f"{name}.csv.gz", keep_default_na=False)
    rows["success"] = rows["success"].astype(bool)
    case, kind = rows["concepts"], rows["kind"]
    prompt = kind + ": " + case  # the same two may be a case of several kinds
    return rows.assign(case=case, prompt=prompt, concepts=case.str.split("+"), composer=rows["method"], group=kind)


def in_order(rows: pd.DataFrame, methods: Iterable[str]) -> pd.DataFrame:
    """Rows by kind, by method in the given order, by composition and by seed."""
    kinds, methods = [*TEST, *LARGER], list(methods)
    rows = rows.sort_values(["case", "seed"])
    return rows.sort_values(["kind", "method"], key=lambda column: column.map([*kinds, *methods].index), kind="stable")


def success(asked: str) -> str:
    """Of methods on the compositions of a split."""
    split, names, count, *more = asked.split("; ")
    rows, methods = verdicts(split), [*OTHERS] if names == "others" else names.split(" / ")
    against = next((option.removeprefix("less ") for option in more if option != "shared"), None)
    if against:
        methods.insert(0, against)
    if unknown := set(methods) - set(rows["method"]):
        raise ValueError(f"{split}.csv.gz has no method {sorted(unknown)}, but {sorted(set(rows['method']))}")
    first = sorted(rows["seed"].unique())[: int(count.removesuffix(" seeds"))]
    rows = rows[rows["method"].isin(methods) & rows["seed"].isin(first)]
    if "shared" in more:
        rows = shared(rows, methods)
    return success_table(in_order(rows, methods), against=against, resample="concepts")


def shared(rows: pd.DataFrame, methods: Iterable[str]) -> pd.DataFrame:
    """Rows of these methods, of the compositions and seeds that all of them have."""
    rows = rows[rows["method"].isin(methods := set(methods))]
    return rows[rows.groupby(["prompt", "seed"])["method"].transform("nunique") == len(methods)]


def counts(asked: str) -> str:
    """Of methods on the compositions of a split: pictures with success, of how many, a row per kind."""
    split, names, count = asked.split("; ")
    rows, methods = verdicts(split), names.split(" / ")
    first = sorted(rows["seed"].unique())[: int(count.removesuffix(" seeds"))]
    rows = in_order(rows[rows["method"].isin(methods) & rows["seed"].isin(first)], methods)
    body = []
    for kind, own in rows.groupby("kind", sort=False):
        right = [own.loc[own["method"] == method, "success"] for method in methods]
        cells = [f"{each.sum()} of {len(each)}" if len(each) else "not drawn" for each in right]
        body.append([IN_WORDS.get(str(kind), str(kind)), str(own["case"].nunique()), *cells])
    return markdown(["the prompt asks for", "prompts", *methods], body)


def kinds(asked: str) -> str:
    """Of methods on the compositions of a split, a row per kind: shares of success, and of the last method's successes those
    that also show a subject that nobody asked for."""
    split, names, count = asked.split("; ")
    rows, methods = verdicts(split), names.split(" / ")
    first = sorted(rows["seed"].unique())[: int(count.removesuffix(" seeds"))]
    right = rows[(rows["method"] == methods[-1]) & rows["seed"].isin(first) & rows["success"]]
    head, _, *lines = [line.strip("| ").split(" | ") for line in success(asked).splitlines()]
    body = []
    for kind, *shares in zip(head[1:], *(line[1:] for line in lines), strict=True):
        more = right.loc[right["kind"] == kind, "another"]
        body.append([IN_WORDS.get(kind, kind), *shares, f"{more.sum()} of {len(more)}"])
    return markdown(["the prompt asks for", *methods, f"{methods[-1]}, right but with one more"], body)


def ladder(asked: str) -> str:
    """By what is free to learn, a column per number of updates."""
    rows, columns = verdicts("ladder"), ["0", *asked.removesuffix(" updates").split(", ")]
    name = rows["method"].str.partition(" @ ")
    rows = in_order(rows.assign(method=name[0], updates=name[2].replace("", "0")), RUNGS)
    body = [
        [method, RUNGS[method], *(interval(own[own["updates"] == count], "success") for count in columns)]
        for method, own in rows.groupby("method", sort=False)
    ]
    return markdown(["method", "free to learn", "untrained", *(f"{count} updates" for count in columns[1:])], body)


def wordings(asked: str) -> str:
    """By how the prompt says it: the forms of the base's captions together, then others."""
    methods = asked.split(" / ")
    rows = verdicts("robustness").query("axis == 'wording'")
    told = rows["setting"].map(WORDINGS)
    forms = rows.loc[told.isna(), "setting"].nunique()
    rows = rows.assign(said=told.fillna(f"the {forms} forms of the base's captions"))
    body = [
        [said, *(interval(own[own["method"] == method], "success", resample="concepts") for method in methods)]
        for said, own in rows.groupby("said", sort=False)
    ]
    return markdown(["the prompt", *methods], body)


def joint(asked: str) -> str:
    """By composition, rank and updates: right pictures, of how many, and Wilson's interval over pictures."""
    methods, body = asked.split(" / "), []
    for (case, rank, updates), own in verdicts("joint").groupby(["case", "rank", "updates"]):
        right = [own.loc[own["method"] == method, "success"] for method in methods]
        ends = [wilson(each.mean(), len(each)) for each in right]
        cells = [f"{each.sum()} of {len(each)} [{a:.2f}, {b:.2f}]" for each, (a, b) in zip(right, ends, strict=True)]
        body.append([case.replace("+", ", "), str(rank), str(updates), *cells])
    return markdown(["taught on", "rank", "updates for each", *methods], body)


def numbers() -> dict[str, str]:
    """What `SENTENCES` count. Raises ValueError if FreeFuse is not the best of the others."""
    rows = verdicts("test")
    shown = rows[rows["method"] == "tiles"]
    hard = shown[shown["kind"].isin(["contact", "two subjects, close"])]
    three = shown[shown["kind"].str.startswith("three")]
    right = pd.concat([hard, three]).query("success")
    two = rows[rows["kind"] == "two subjects"].pivot(index=["seed", "case"], columns="method", values="success")
    first = two.loc[two.index.levels[0].min()]
    best = first[[*TOLD_THE_PROMPT]].sum()
    if best["freefuse"] < best.max():
        raise ValueError(f"the best of the others is {best.idxmax()}")
    reworded = verdicts("robustness").query("setting == 'other words'").groupby("method")["success"].agg(["sum", "size"])
    gated = {"none": "tiles", **TRAINED}
    of_gates = shared(rows, gated.values())
    counted = {
        **{"hard": hard["success"].sum(), "of_hard": len(hard), "three": three["success"].sum(), "of_three": len(three)},
        **{"all_hard": len(right), "with_more": right["another"].sum(), "others": len(TOLD_THE_PROMPT)},
        **{"pictures": len(two), **{method: two[method].sum() for method in ("tiles", "freefuse")}},
        **{"won": (two["tiles"] > two["freefuse"]).sum(), "lost": (two["freefuse"] > two["tiles"]).sum()},
        **{"cases": len(first), "told": first[[*TOLD_THE_PLACES]].sum().max()},
        "told_ours": first["words and given places"].sum(),
        **{name: of_gates.loc[of_gates["method"] == method, "success"].sum() for name, method in gated.items()},
        "two_more": shown.query("kind == 'two subjects' and success")["another"].sum(),
        **{"reworded": reworded["sum"]["tiles"], "of_reworded": reworded["size"]["tiles"]},
        "known": reworded["sum"]["base, own words"],
        "of_gates": (of_gates["method"] == "tiles").sum(),
        **{f"{method}_1": first[method].sum() for method in ("sum", "bound", "freefuse", "tiles")},
    }
    return {name: str(count) for name, count in counted.items()}


def said(sentence: str, counted: Mapping[str, str], text: str) -> str:
    """A document with the numbers of a sentence made anew, if it has the sentence; where its lines end does not matter."""
    words = re.split(r"{\w+}", sentence)
    found = re.search(r"(\.?\d+)".join(r"\s+(?:> +)?".join(map(re.escape, part.split(" "))) for part in words), text)
    for place, name in reversed([*enumerate(re.findall(r"{(\w+)}", sentence), 1)]) if found else ():
        text = text[: found.start(place)] + counted[name] + text[found.end(place) :]
    return text


def page(text: str) -> str:
    """A document with its tables and sentences made anew."""
    tables = {"success": success, "counts": counts, "kinds": kinds, "ladder": ladder, "wordings": wordings, "joint": joint}

    def made(found: re.Match[str]) -> str:
        after = "" if found[3] else "\n"  # a table that was there has its empty line after it
        return f"<!-- {found[1]}: {found[2]} -->\n\n{tables[found[1]](found[2])}\n{after}"

    counted = numbers()
    for sentence in SENTENCES:
        text = said(sentence, counted, text)
    return TABLE.sub(made, text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
