"""docs/results.md from the rows: tables and figures, and what each run took."""

from pathlib import Path

from mole_diffusers.evaluation import plots, tables
from mole_diffusers.evaluation.arms import ARMS
from mole_diffusers.evaluation.rows import Row, Rows

SHOWN = "sunflower+doughnut"  # the case of the sample sheet
HEADER = """# Measured on the emoji world

Made by `python demos/emoji/evaluate.py` after `python demos/emoji/train_gates.py`, on 2 CPU cores. Every picture: 20
DDIM steps, guidance 3; test seeds 1000 to 1007 (1000 to 1003 for the world's own tables), validation seeds 2000 to 2003.
Judged by the world's judge, which nothing was trained with. Brackets: 95 % bootstrap interval over cases and seeds.
These are numbers of a small world of 64 x 64 pictures, not of Stable Diffusion 1.5.

Validation and test share no concept: fox, octopus, koala, tomato, ink and duotone chose every default; the other eight
subjects and four styles are the test. Every second case asks for a coloured background, which is reported apart.

Success: every concept that an expert brings is there: all its subjects among the judge's most likely, and the style where
an expert brings it. `alone` is the mean over the case's single LoRAs, each on the whole prompt. `gates` are the committed
ones: LoRA-Flow's form, trained without data for 60 updates on collages; `mole gates` are MoLE's form (one per layer, free
total) trained in the same way. Two ceilings: `joint LoRA`, one LoRA trained on all the concepts' own pictures (never
together; rank 16, 200 updates), and `oracle gates`, static ones (per layer, 4 noise levels) trained on the true drawings of
the case, which no composer may see. `mole gates` were trained for the pairs of subjects alone.

The tables hold what has been drawn so far: the 28 test compositions that have trained gates, of 56, under ten of the arms
that the command knows. It goes on with the rest.
"""
JUDGE = """The judge was looked at by eye on the base's own samples: of 112 base pictures it called 3 wrong that show what
was asked (a sepia panda called noto, a crab called a scorpion, noto grapes called thermal); its other misses, french fries
drawn as a plain box say, are misses of the base."""


def write(rows: dict[str, Rows], took: dict, docs: Path) -> None:
    """Write results.md and its figures."""
    test = _ordered(rows["test"].read())
    parts = [HEADER, "## The world", world_table(rows["world"].read()), JUDGE]
    for part in ("test", "validation"):
        if found := _ordered(rows[part].read()):
            parts += [f"## {part.capitalize()}", *_split(found)]
    plots.bars(test, docs / "success.png")
    plots.sample_grid(_shown(test), rows["test"].folder, docs / "samples.png", case=SHOWN)
    parts += [
        "![Success by arm and kind](success.png)",
        f"![{SHOWN}, four of the test seeds](samples.png)",
        (Path(__file__).parent / "attempts.md").read_text().strip(),
        "## What each run took",
        took_table(took),
    ]
    (docs / "results.md").write_text("\n\n".join(parts) + "\n")


def _split(found: list[Row]) -> list[str]:
    return [
        tables.success_table(found),
        "Behind success, over all kinds: the share of concepts seen; recovery, of what the single LoRA shows; the\n"
        "harmonic mean over a case's concepts; cosine likeness to the artist's own drawing; style, background, and\n"
        "several subjects each in its own place.",
        tables.concept_table(found),
        "Success less that of the sum, on the same cases and seeds:",
        tables.paired_table(found, "sum"),
        "Each case, share of its seeds:",
        tables.case_table(found),
    ]


def _ordered(rows: list[Row]) -> list[Row]:
    """Rows in the order of `ARMS`, then the ceilings."""
    known = {name: i for i, name in enumerate(ARMS)}
    return sorted(rows, key=lambda row: known.get("alone" if row["arm"].startswith("alone ") else row["arm"], len(ARMS)))


def _shown(rows: list[Row]) -> list[Row]:
    """Four seeds of the shown case under every arm but single LoRAs."""
    seeds = sorted({row["seed"] for row in rows})[:4]
    shown = [row for row in rows if row["case"] == SHOWN and row["seed"] in seeds]
    return [row for row in shown if not row["arm"].startswith("alone ")]


def world_table(rows: list[Row]) -> str:
    """How well the base and each LoRA alone do what they were taught."""
    titles = {"base": "base, its own subjects and styles", "subject": "subject LoRAs alone", "style": "style LoRAs alone"}
    values = (lambda r: r["subjects"], lambda r: float(r["style"]), lambda r: r["subjects"] * r["style"])
    groups = tables.by(rows, "kind")
    body = [[title, *(tables.interval(groups[kind], v) for v in values)] for kind, title in titles.items()]
    for arm, group in tables.by(rows, "arm").items():
        if arm != "base":
            name = arm.removeprefix("alone ")
            body.append([name, *(f"{sum(v(r) for r in group) / len(group):.2f}" for v in values)])
    return tables.markdown(["what", "subject seen", "asked style", "both"], body)


def took_table(took: dict) -> str:
    return tables.markdown(
        ["run", "facts"], [[name, ", ".join(f"{k} {v}" for k, v in facts.items())] for name, facts in took.items()]
    )
