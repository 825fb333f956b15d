"""Judge the world and its compositions, and write the tables to RESULTS.md.

    python demos/emoji/evaluate.py [world] [compositions] [table]

Every picture: 20 DDIM steps, guidance 3, its own seed; none of the seeds was used in training. Rows are appended to
work/rows.jsonl with all they need, and rows that exist are not made again.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from compose import name_of
from loop import WORK, device
from tqdm import tqdm

from mole_diffusers import attach, detach, emoji, emoji_world
from mole_diffusers.compare import sample

SEEDS = list(range(1000, 1008))
OPTIONS = {"num_inference_steps": 20, "guidance_scale": 3.0}
ROWS, RESULTS = WORK / "rows.jsonl", Path(__file__).parent / "RESULTS.md"
KINDS = {
    "subject x style": emoji.SUBJECT_STYLE,
    "subject + subject": emoji.SUBJECT_PAIRS,
    "two subjects + style": emoji.TRIPLES,
}

HEADER = """# The emoji world, measured

Written by `python demos/emoji/evaluate.py`. Every picture: 20 DDIM steps, guidance 3, seeds 1000 to 1007 (1000 to 1003 for
the world's own tables), which nothing was trained or chosen on. Judged by the world's judge, which nothing was trained
with. Brackets: 95 % bootstrap interval over names and seeds. These are numbers of a small world of 64 x 64 pictures, not
of Stable Diffusion 1.5.

Success: every concept that an expert brings is there: all its subjects among the judge's first, and the style where an
expert brings it. `alone` is the mean over the composition's single LoRAs, each on the composed prompt. Two ceilings: one
LoRA trained on all the concepts' own pictures (never together), and gates trained on the composition's true drawings.
"-" was not run. The gates' setting was chosen on four of these compositions (fox+ink, koala+duotone, tomato+glossy,
fox+octopus) with seeds 2000 to 2007, so the table is no clean test split of compositions.

The base's first 3,000 updates (batch 24) were on 48 subjects, of which it drew none recognisably; the rest (batch 32) on
the 28 that it has now. The joint LoRAs had 90 updates, fewer than the single ones (220 and 300): too few for a style, so
their figures with a style are no ceiling yet.
"""


def read_rows() -> list[dict]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def judged(world, judge, scene: emoji.Scene, seeds: list[int]) -> list[dict]:
    """One row per seed: what the judge sees of what the scene asks."""
    verdict = judge.verdict(sample(world.pipe, scene.caption, seeds, **OPTIONS))
    seen, style = judge.sees(verdict, scene.subjects), judge.is_style(verdict, scene.style)
    background = judge.is_background(verdict, scene.background)
    return [
        {"seed": s, "subjects": seen[i].tolist(), "style": bool(style[i]), "background": bool(background[i])}
        for i, s in enumerate(seeds)
    ]


def tasks(world) -> Iterator[tuple[str, str, emoji.Scene, list[int], dict, object]]:
    """(part, name, scene, seeds, experts, gates) of everything the world's own report needs."""
    styles = emoji.BASE_STYLES
    for i, subject in enumerate(emoji.BASE_SUBJECTS):
        yield "base", subject, emoji.Scene((subject,), styles[i % len(styles)]), SEEDS[:4], {}, "sum"
    for concept in emoji.HELD_OUT_SUBJECTS:
        for i in range(4):  # 4 styles x 4 seeds
            scene = emoji.Scene((concept,), styles[(i + len(concept)) % len(styles)])
            yield "subject", concept, scene, SEEDS[:4], {concept: world.loras[concept]}, "sum"
    for concept in emoji.HELD_OUT_STYLES:
        for i in range(4):
            scene = emoji.Scene((emoji.BASE_SUBJECTS[(7 * i + 5 * len(concept)) % len(emoji.BASE_SUBJECTS)],), concept)
            yield "style", concept, scene, SEEDS[:4], {concept: world.loras[concept]}, "sum"


def arms(world, concepts) -> Iterator[tuple[str, dict, object, dict | None]]:
    """(arm, experts, gates, fixed weights) of one composition."""
    experts = {c: world.loras[c] for c in concepts}
    name = name_of(concepts)
    yield "base", experts, "sum", {}
    for concept in concepts:
        yield f"alone {concept}", experts, "sum", {concept: 1.0}
    yield "sum", experts, "sum", None
    yield "mean", experts, "mean", None
    yield "gates", experts, world.folder / "gates" / name, None
    oracle, joint = WORK / "oracle" / name, WORK / "joint" / f"{name}.safetensors"
    if oracle.exists():  # the ceilings are made by train_gates.py and are not committed
        yield "oracle gates", experts, oracle, None
    if joint.exists():
        yield "joint LoRA", {"joint": joint}, "sum", None


def run_world(world, judge) -> None:
    done = {(r["part"], r["name"], r["prompt"]) for r in read_rows()}
    for part, name, scene, seeds, experts, gates in tqdm(list(tasks(world)), desc="world"):
        if (part, name, scene.caption) in done:
            continue
        detach(world.pipe)
        if experts:
            attach(world.pipe, experts, gates)
        append(judged(world, judge, scene, seeds), part=part, name=name, prompt=scene.caption)


def run_compositions(world, judge) -> None:
    done = {(r["part"], r["name"], r.get("arm")) for r in read_rows()}
    work = [(kind, c, arm) for kind, group in KINDS.items() for c in group for arm in arms(world, c)]
    for kind, concepts, (arm, experts, gates, fixed) in tqdm(work, desc="compositions"):
        if (kind, name_of(concepts), arm) in done:
            continue
        mixture = attach(world.pipe, experts, gates)
        scene = emoji.composition_scene(concepts)
        with mixture.fixed(fixed) if fixed is not None else mixture.only(*experts):
            append(judged(world, judge, scene, SEEDS), part=kind, name=name_of(concepts), arm=arm, prompt=scene.caption)


def append(rows: list[dict], **facts: str) -> None:
    WORK.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        file.writelines(json.dumps({**facts, **OPTIONS, **row}) + "\n" for row in rows)


def interval(groups: list[list[float]], draws: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval, resampling groups (compositions) and the seeds within them."""
    table, rng = np.array(groups, float), np.random.default_rng(0)  # [groups, seeds]
    g, s = table.shape
    picks = table[rng.integers(0, g, (draws, g, 1)), rng.integers(0, s, (draws, g, s))]
    low, high = np.quantile(picks.mean((1, 2)), [0.025, 0.975])
    return float(table.mean()), float(low), float(high)


def success(row: dict) -> float:
    """Every concept asked of an expert is there: all subjects, and the style where an expert brings it."""
    return float(all(row["subjects"]) and (row["style"] or row["part"] == "subject + subject"))


def by(rows: list[dict], key: str) -> dict[str, list[dict]]:
    out: dict[str, list[dict]] = {}
    for row in rows:
        out.setdefault(row[key], []).append(row)
    return out


def cell(rows: list[dict], value=success) -> str:
    groups = [[value(r) for r in group] for group in by(rows, "name").values()]
    mean, low, high = interval(groups)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def composition_table(rows: list[dict]) -> str:
    """Arms x kinds; `alone` is the mean over the single LoRAs."""
    order = ["base", "alone", "sum", "mean", "gates", "oracle gates", "joint LoRA"]
    rows = [r | {"arm": r["arm"].split(" ")[0] if r["arm"].startswith("alone") else r["arm"]} for r in rows if "arm" in r]
    lines = ["| arm | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for arm in order:
        groups = {kind: [r for r in rows if r["arm"] == arm and r["part"] == kind] for kind in KINDS}
        if any(groups.values()):
            lines.append(f"| {arm} | " + " | ".join(cell(g) if g else "-" for g in groups.values()) + " |")
    return "\n".join(lines)


def detail_table(rows: list[dict]) -> str:
    """Every composition x arm, share of its 8 seeds."""
    rows = [r for r in rows if "arm" in r]
    arms_ = ["base", "best alone", "sum", "mean", "gates", "oracle gates", "joint LoRA"]
    lines = ["| composition | " + " | ".join(arms_) + " |", "|---|" + "---|" * len(arms_)]
    for name, group in by(rows, "name").items():
        shares = {arm: np.mean([success(r) for r in g]) for arm, g in by(group, "arm").items()}
        shares["best alone"] = max(v for k, v in shares.items() if k.startswith("alone"))
        lines.append(
            f"| {name.replace('_', ' ')} | " + " | ".join((f"{shares[a]:.2f}" if a in shares else "-") for a in arms_) + " |"
        )
    return "\n".join(lines)


def world_table(rows: list[dict]) -> str:
    lines = ["| what | subject recognised | asked style | both |", "|---|---|---|---|"]
    for part, title in (
        ("base", "base, own subjects and styles"),
        ("subject", "subject LoRAs alone"),
        ("style", "style LoRAs alone"),
    ):
        group = [r for r in rows if r["part"] == part]
        if group:
            values = (
                lambda r: float(all(r["subjects"])),
                lambda r: float(r["style"]),
                lambda r: float(all(r["subjects"]) and r["style"]),
            )
            lines.append(f"| {title} | " + " | ".join(cell(group, v) for v in values) + " |")
    for part in ("subject", "style"):
        for name, group in by([r for r in rows if r["part"] == part], "name").items():
            seen, style = (np.mean([f(r) for r in group]) for f in (lambda r: all(r["subjects"]), lambda r: r["style"]))
            both = np.mean([all(r["subjects"]) and r["style"] for r in group])
            lines.append(f"| {name} | {seen:.2f} | {style:.2f} | {both:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = ["world", "compositions", "table"]
    parser.add_argument("what", nargs="*", default=steps, help=f"of {steps}; default: all")
    what = parser.parse_args().what
    if unknown := set(what) - set(steps):
        parser.error(f"unknown {sorted(unknown)}; known: {steps}")
    if {"world", "compositions"} & set(what):
        world = emoji_world(device=str(device()))
        judge = world.judge()
        if "world" in what:
            run_world(world, judge)
        if "compositions" in what:
            run_compositions(world, judge)
    rows, took = read_rows(), json.loads((WORK / "took.json").read_text())
    times = "\n".join(f"| {name} | {facts} |" for name, facts in took.items())
    RESULTS.write_text(
        HEADER
        + f"\n## The world\n\n{world_table(rows)}\n"
        + f"\n## Compositions\n\n{composition_table(rows)}\n"
        + f"\n## Each composition, share of its 8 seeds\n\n{detail_table(rows)}\n"
        + f"\n## What each run took\n\n| run | facts |\n|---|---|\n{times}\n"
    )
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
