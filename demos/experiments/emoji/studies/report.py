"""docs/results.md from the rows: tables and figures, and what each run took."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from arms import BLENDED, MIXED, PROMPTED
from kept_rows import pack
from pages import fill
from train_gates import FAMILIES

from mole_diffusers import emoji
from mole_diffusers.evaluation import plots, tables
from mole_diffusers.evaluation.arms import CONTROLS
from mole_diffusers.evaluation.choosing import ARMS
from mole_diffusers.evaluation.rows import Row, Rows
from mole_diffusers.evaluation.runner import picture_path

HERE = Path(__file__).parent
SHOWN = "sunflower+doughnut"  # the case of the sample sheet
FREE = tuple(arm for arm in ARMS if arm not in CONTROLS)  # what no training on the composition made
TRAINED = ("gates", *(f"{family} gates" for family in FAMILIES if family != "flow"))
CEILINGS = (*(f"{family} oracle" for family in FAMILIES), "joint LoRA")
SHEET = ("base", "sum", "regmean", "gates", MIXED, "rank gates", "flow oracle")
STRICT = ("sum", "np", "ssr", "regmean", TRAINED[0], MIXED, PROMPTED, BLENDED, *TRAINED[1:])
MAIN = (*FREE, TRAINED[0], MIXED, PROMPTED, BLENDED, *TRAINED[1:], *CEILINGS)  # controls have a page of their own


def write(rows: dict[str, Rows], took: dict, docs: Path) -> None:
    """Write results.md and its figures, and pack the rows."""
    found = {name: ordered(part.read()) for name, part in rows.items()}
    figures(found, rows["test"].folder, docs)
    for name, part in rows.items():
        pack(part, name)
    (docs / "results.md").write_text(document(found, took))


def document(found: dict[str, list[Row]], took: dict) -> str:
    """results.md, from the rows of each step in the order of `ordered`."""
    compared = of_cases(found["test"], emoji.COMPARED)
    parts = {
        "world": world_table(found["world"]),
        "free": tables.success_table(named(found["test"], FREE)),
        "free_paired": tables.paired_table(named(found["test"], FREE), "sum"),
        "compared": tables.success_table(named(compared, MAIN)),
        "compared_paired": tables.paired_table(named(compared, MAIN), "sum"),
        "behind": tables.by_kind(named(compared, MAIN), tables.concept_table),
        "cases": tables.case_table(named(compared, ("sum", "grid search", "np", TRAINED[0], MIXED, BLENDED, *CEILINGS))),
        "crowded": crowd_table(found["crowded"]),
        "strict": tables.paired_table(named(compared, STRICT), "sum", resampled=tables.concepts_of),
        "regmean_paired": tables.paired_table(named(compared, STRICT), "regmean"),
        "regmean_strict": tables.paired_table(named(compared, STRICT), "regmean", resampled=tables.concepts_of),
        "free_strict": tables.paired_table(
            named(found["test"], ("sum", "ssr", "regmean")), "sum", resampled=tables.concepts_of
        ),
        "controls": tables.success_table(compared),
        "validation": validation_table(named(found["validation"], (*FREE, TRAINED[0], MIXED, PROMPTED, *TRAINED[1:]))),
        "attempts": (HERE / "attempts.md").read_text().strip(),
        "took": took_table(took),
    }
    return fill((HERE / "results_text.md").read_text(), parts)


def figures(found: dict[str, list[Row]], pictures: Path, docs: Path) -> None:
    """Bars, samples, and what happens as strength moves and as experts crowd in."""
    compared = of_cases(found["test"], emoji.COMPARED)
    plots.bars(named(compared, MAIN), docs / "success.png")
    shown = [row for row in named(compared, SHEET) if row["case"] == SHOWN]
    seeds = sorted({row["seed"] for row in shown})[:4]
    shown = [row for row in shown if row["seed"] in seeds]
    if all(picture_path(pictures, row).exists() for row in shown):  # packed rows have none
        plots.sample_grid(shown, pictures, docs / "samples.png", case=SHOWN)
    plots.frontier(found["moved"], docs / "frontier.png")
    plots.against_count(found["crowded"], docs / "experts.png")


def named(rows: Sequence[Row], arms: Sequence[str]) -> list[Row]:
    """The rows of some arms; "alone" stands for every single LoRA."""
    return [row for row in rows if _arm(row) in arms]


def of_cases(rows: Sequence[Row], cases: Sequence[emoji.Concepts]) -> list[Row]:
    """The rows of some compositions."""
    names = {"+".join(case) for case in cases}
    return [row for row in rows if row["case"] in names]


def ordered(rows: list[Row]) -> list[Row]:
    """Rows by arm in the order of `MAIN`, then the others; by kind, case, prompt and seed as the splits have them.

    The same rows give the same intervals, wherever they were read from.
    """
    arms = {name: i for i, name in enumerate(MAIN)}
    kinds = {kind: i for i, kind in enumerate(emoji.TEST)}
    split = [case for part in (emoji.TEST, emoji.VALIDATION) for group in part.values() for case in group]
    cases = {"+".join(case): i for i, case in enumerate(split)}

    def place(row: Row) -> tuple:
        first = arms.get(_arm(row), len(arms)), kinds.get(row["kind"], len(kinds))
        return *first, row["arm"], cases.get(row["case"], len(cases)), row["case"], row["prompt"], row["seed"]

    return sorted(rows, key=place)


def _arm(row: Row) -> str:
    return "alone" if row["arm"].startswith("alone ") else row["arm"]


def world_table(rows: list[Row]) -> str:
    """How well the base and each LoRA alone do what they were taught."""
    titles = {"base": "base, its own subjects and styles", "subject": "subject LoRAs alone", "style": "style LoRAs alone"}
    values = (lambda r: r["subjects"], lambda r: float(r["style"]), lambda r: r["subjects"] * r["style"])
    groups = tables.by(rows, "kind")
    body = [[title, *(tables.interval(groups.get(kind, []), v) for v in values)] for kind, title in titles.items()]
    for arm, group in tables.by(rows, "arm").items():
        if arm != "base":
            name = arm.removeprefix("alone ")
            body.append([name, *(f"{sum(v(r) for r in group) / len(group):.2f}" for v in values)])
    return tables.markdown(["what", "subject seen", "asked style", "both"], body)


def validation_table(rows: list[Row]) -> str:
    """Success by arm and kind, and the mean of all kinds, which is what defaults are chosen by."""
    lines = tables.success_table(rows).splitlines()
    groups = [tables.by(group, "kind") for group in tables.by(tables.together(rows), "arm").values()]
    shares = [[statistics.mean(float(row["success"]) for row in own) for own in group.values()] for group in groups]
    every = max(map(len, shares))
    column = ["mean", "---", *(f"{statistics.mean(own):.2f}" if len(own) == every else "-" for own in shares)]
    return "\n".join(f"{line} {cell} |" for line, cell in zip(lines, column, strict=True))


def crowd_table(rows: list[Row]) -> str:
    """Success by arm and number of experts."""
    by_count = [{**row, "count": len(row["seen"]) + len(row["idle"])} for row in rows]
    counts = sorted({row["count"] for row in by_count})
    body = []
    for arm, group in tables.by(by_count, "arm").items():
        cells = tables.by(group, "count")
        body.append([arm, *(tables.interval(cells.get(n, []), lambda r: float(r["success"])) for n in counts)])
    return tables.markdown(["arm", *(f"{n} LoRAs" for n in counts)], body)


def took_table(took: dict) -> str:
    return tables.markdown(
        ["run", "facts"], [[name, ", ".join(f"{k} {v}" for k, v in facts.items())] for name, facts in took.items()]
    )
