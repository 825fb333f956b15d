"""docs/results.md from the rows: its tables and figures, and what each run took."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from composers import BLENDED, MIXED, PROMPTED
from kept_rows import pack
from pages import fill
from train_gates import FAMILIES

from mole_diffusers import emoji
from mole_diffusers.evaluation import emoji_protocol, plots, tables
from mole_diffusers.evaluation.arms import ARMS, CONTROLS
from mole_diffusers.evaluation.rows import Row, Rows, picture_path

HERE = Path(__file__).parent
SHOWN = "sunflower+doughnut"  # the case of the sample sheet
FREE = tuple(arm for arm in ARMS if arm not in CONTROLS)  # what no training on the composition made
TRAINED = ("gates", *(f"{family} gates" for family in FAMILIES if family != "flow"))
CEILINGS = (*(f"{family} oracle" for family in FAMILIES), "joint LoRA")
SHEET = ("base", "sum", "regmean", "gates", MIXED, "rank gates", "flow oracle")
STRICT = ("sum", "np", "ssr", "regmean", TRAINED[0], MIXED, PROMPTED, BLENDED, *TRAINED[1:])
MAIN = (*FREE, TRAINED[0], MIXED, PROMPTED, BLENDED, *TRAINED[1:], *CEILINGS)  # controls have a page of their own


def write(rows: Mapping[str, Rows], took: Mapping[str, dict], docs: Path) -> None:
    """Write results.md and its figures, and pack the rows."""
    found = {name: ordered(part.read()) for name, part in rows.items()}
    figures(found, rows["test"].folder, docs)
    for name, part in rows.items():
        pack(part, name)
    (docs / "results.md").write_text(document(found, took))


def document(found: Mapping[str, pd.DataFrame], took: Mapping[str, dict]) -> str:
    """results.md, from the rows of each step as from `ordered`."""
    test, compared = found["test"], of_cases(found["test"], emoji.COMPARED)
    main, free, strict = named(compared, MAIN), named(test, FREE), named(compared, STRICT)
    parts = {
        "world": world_table(found["world"]),
        "free": tables.success_table(free),
        "free_paired": tables.paired_table(free, "sum"),
        "compared": tables.success_table(main),
        "compared_paired": tables.paired_table(main, "sum"),
        "behind": tables.by_kind(main, emoji_protocol.concept_table),
        "cases": case_table(named(compared, ("sum", "grid search", "np", TRAINED[0], MIXED, BLENDED, *CEILINGS))),
        "crowded": crowd_table(found["crowded"]),
        "strict": tables.paired_table(strict, "sum", resample="concepts"),
        "regmean_paired": tables.paired_table(strict, "regmean"),
        "regmean_strict": tables.paired_table(strict, "regmean", resample="concepts"),
        "free_strict": tables.paired_table(named(test, ("sum", "ssr", "regmean")), "sum", resample="concepts"),
        "controls": tables.success_table(compared),
        "validation": validation_table(named(found["validation"], (*FREE, TRAINED[0], MIXED, PROMPTED, *TRAINED[1:]))),
        "attempts": (HERE / "attempts.md").read_text().strip(),
        "took": took_table(took),
    }
    return fill((HERE / "results_text.md").read_text(), parts)


def figures(found: Mapping[str, pd.DataFrame], pictures: Path, docs: Path) -> None:
    """Bars, samples, and what happens as strength moves and as idle LoRAs are added."""
    compared = of_cases(found["test"], emoji.COMPARED)
    plots.bars(named(compared, MAIN), docs / "success.png")
    shown = named(compared, SHEET)
    shown = shown[shown["case"] == SHOWN]
    sheet = shown[shown["seed"].isin(sorted(shown["seed"].unique())[:4])].to_dict("records")
    if all(picture_path(pictures, row).exists() for row in sheet):  # packed rows have none
        plots.sample_grid(sheet, pictures, docs / "samples.png", case=SHOWN)
    plots.frontier(found["moved"], docs / "frontier.png", emoji_protocol.REPORT.roles)
    plots.against_count(found["crowded"], docs / "experts.png")


def named(rows: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """The rows of some arms; "alone" stands for every single LoRA."""
    return rows[rows["composer"].isin(arms)]


def of_cases(rows: pd.DataFrame, cases: Sequence[emoji.Concepts]) -> pd.DataFrame:
    """The rows of some compositions."""
    return rows[rows["case"].isin(["+".join(case) for case in cases])]


def ordered(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a table, by arm in the order of `MAIN`, then the others; by kind, case, prompt and seed in the splits' order.

    The same rows give the same intervals, wherever they were read from.
    """
    arms = {name: i for i, name in enumerate(MAIN)}
    kinds = {kind: i for i, kind in enumerate(emoji.TEST)}
    split = [case for part in (emoji.TEST, emoji.VALIDATION) for group in part.values() for case in group]
    cases = {"+".join(case): i for i, case in enumerate(split)}

    def place(row: Row) -> tuple:
        composer = "alone" if row["arm"].startswith("alone ") else row["arm"]
        first = arms.get(composer, len(arms)), kinds.get(row["kind"], len(kinds))
        return *first, row["arm"], cases.get(row["case"], len(cases)), row["case"], row["prompt"], row["seed"]

    return emoji_protocol.frame(sorted(rows, key=place))


def world_table(rows: pd.DataFrame) -> str:
    """How well the base and each LoRA alone do what they were taught."""
    titles = {"base": "base, its own subjects and styles", "subject": "subject LoRAs alone", "style": "style LoRAs alone"}
    rows, values = rows.assign(both=rows["subjects"] * rows["style"]), ["subjects", "style", "both"]
    body = [[title, *(tables.interval(rows[rows["kind"] == kind], v) for v in values)] for kind, title in titles.items()]
    means = rows[rows["arm"] != "base"].groupby("arm", sort=False)[values].mean()
    body += [[arm.removeprefix("alone "), *(f"{mean:.2f}" for mean in own)] for arm, own in means.iterrows()]
    return tables.markdown(["what", "subject seen", "asked style", "both"], body)


def case_table(rows: pd.DataFrame) -> str:
    """Every case, a column per arm: the share of its seeds that succeed."""
    means = rows.groupby(["case", "composer"])["success"].mean()
    arms = rows["composer"].unique()
    body = [
        [case, *(f"{means[case, a]:.2f}" if (case, a) in means else "-" for a in arms)] for case in rows["case"].unique()
    ]
    return tables.markdown(["case", *arms], body)


def validation_table(rows: pd.DataFrame) -> str:
    """Success by arm and kind, and the mean of all kinds, which is what defaults are chosen by."""
    shares = rows.groupby(["composer", "kind"], sort=False)["success"].mean().groupby("composer", sort=False)
    every = rows["kind"].nunique()
    means = [f"{own.mean():.2f}" if len(own) == every else "-" for _, own in shares]
    lines = tables.success_table(rows).splitlines()
    return "\n".join(f"{line} {cell} |" for line, cell in zip(lines, ["mean", "---", *means], strict=True))


def crowd_table(rows: pd.DataFrame) -> str:
    """Success by arm and number of attached LoRAs."""
    counts = sorted(rows["attached"].unique())
    body = [
        [arm, *(tables.interval(own[own["attached"] == count], "success") for count in counts)]
        for arm, own in rows.groupby("arm", sort=False)
    ]
    return tables.markdown(["arm", *(f"{count} LoRAs" for count in counts)], body)


def took_table(took: Mapping[str, dict]) -> str:
    return tables.markdown(
        ["run", "facts"], [[name, ", ".join(f"{k} {v}" for k, v in facts.items())] for name, facts in took.items()]
    )
