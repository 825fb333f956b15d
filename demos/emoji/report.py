"""docs/results.md from the rows: tables and figures, and what each run took."""

from pathlib import Path

from mole_diffusers.evaluation import plots, tables
from mole_diffusers.evaluation.rows import Row

HEADER = """# Measured on the emoji world

Made by `python demos/emoji/evaluate.py` on 2 CPU cores. Every picture: 20 DDIM steps, guidance 3; test seeds 1000 to 1007
(1000 to 1003 for the world's own tables), validation seeds 2000 to 2003. Judged by the world's judge, which nothing was
trained with. Brackets: 95 % bootstrap interval over cases and seeds. These are numbers of a small world of 64 x 64
pictures, not of Stable Diffusion 1.5.

Validation and test share no concept: fox, octopus, koala, tomato, ink and duotone chose every default; the other eight
subjects and four styles are the test. Every second case asks for a coloured background, which is reported apart.

Success: every concept that an expert brings is there: all its subjects among the judge's most likely, and the style where
an expert brings it. `alone` is the mean over the case's single LoRAs, each on the whole prompt. Two ceilings: `joint LoRA`,
one LoRA trained on all the concepts' own pictures (never together), and `oracle gates`, trained on the true drawings of the
case, which no composer may see.
"""


def write(rows: dict[str, list[Row]], took: dict, docs: Path) -> None:
    """Write results.md and its figures."""
    parts = [HEADER, "## The world", world_table(rows["world"])]
    for part in ("test", "validation"):
        if found := rows[part]:
            parts += [
                f"## {part.capitalize()}",
                tables.success_table(found),
                "Behind success, over all kinds: the share of concepts seen; recovery, of what the single LoRA shows; the\n"
                "harmonic mean over a case's concepts; cosine likeness to the artist's own drawing; style, background, and\n"
                "several subjects each in its own place.",
                tables.concept_table(found),
                tables.paired_table(found, "sum"),
                f"### Each case of the {part}, share of its seeds",
                tables.case_table(found),
            ]
    plots.bars(rows["test"], docs / "success.png")
    parts += ["![Success by arm and kind](success.png)", "## What each run took", took_table(took)]
    (docs / "results.md").write_text("\n\n".join(parts) + "\n")


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
