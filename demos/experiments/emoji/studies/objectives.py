"""What gates learn under each objective, gate and start: trained and judged on validation compositions, cell by cell.

    python demos/experiments/emoji/studies/objectives.py [SETTING ...]
    python demos/experiments/emoji/studies/objectives.py report

A cell is one setting on one composition and lies in work/objectives/ as its own file; cells that exist, those packed in
rows/ too, are not made again, and several processes may work side by side. `report` writes docs/training_table.md from all
cells, and packs them.
"""

import argparse
import fcntl
import gzip
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "training"))

import pandas as pd
from compose import joint_samples, lesson, name_of
from evaluate import DOCS, OPTIONS, VALIDATION_SEEDS
from kept_rows import KEPT
from loop import WORK, device, small_attention
from pages import fill
from train_gates import FAMILIES, REDRAW, TRAINING

from mole_diffusers import GateConfig, attach, detach, emoji, emoji_world
from mole_diffusers.evaluation import emoji_protocol, tables
from mole_diffusers.inspection.compare import sample
from mole_diffusers.training.config import INITIAL, GateTraining
from mole_diffusers.training.gate_trainer import train_gates
from mole_diffusers.training.rewards import read_clip

FOLDER = WORK / "objectives"
PAIRS = "subject + subject"
REFERENCE = "flow, collage"  # whose training time is 1
PACKED = KEPT / "objectives.json.gz"
EACH, ALL = 3, 6  # compositions of each kind; for what is in MORE, pairs of subjects
MORE = ("sum", "flow, collage", "flow, single and composed", "flow, single, composed and collage")
KINDS = ("subject x style", "subject + subject")
MOLE = GateConfig("mole", granularity="block", total="N")
STARTING = GateConfig("mole", granularity="layer", total="linear", bias=True)
OWN_RATE = replace(TRAINING, lr=None)  # each gate's own rate: 1e-2 is too much for features of a thousand entries and more


def _mole(**options) -> GateConfig:
    return replace(MOLE, **options)


def _on(terms: Mapping, **options) -> GateTraining:
    return replace(TRAINING, terms=terms, **options)


COLLAGE = {"collage": {"guidance": 3.0}}
OBJECTIVES = {
    "single and composed": _on({"single": 1.0, "composed": 1.0}),
    "single, composed and collage": _on({"single": 1.0, "composed": 1.0} | COLLAGE),
    "denoise": _on({"denoise": 1.0}),
    "clip": _on({"clip": 1.0}, steps=40, batch=2),
    "rollout": _on({"rollout": {"steps": 8}}, steps=16, batch=2),
}
TRIED = {  # as in train_gates.FAMILIES; 1e-2 is what flow's first trials chose
    **dict.fromkeys(("flow", "prompt", "rank", "retrieval"), (0.003, 0.01, 0.03)),
    **dict.fromkeys(("mole", "static"), (0.01, 0.05)),  # a weight per expert where the others have a matrix
}
SETTINGS: dict[str, tuple[GateConfig, GateTraining | None]] = {
    "sum": (GateConfig("sum"), None),
    "flow, collage": (FAMILIES["flow"], TRAINING),
    **{f"mole {g} N, collage": (_mole(granularity=g), TRAINING) for g in ("model", "block", "layer", "matrix")},
    **{f"mole block {t}, collage": (_mole(total=t), TRAINING) for t in ("1", "sigmoid", "linear")},
    "mole block 1, collage and balance": (_mole(total="1"), _on(COLLAGE | {"balance": 0.5})),
    "mole block N of expert outputs, collage": (_mole(inputs="experts"), OWN_RATE),
    "mole block N of flattened states, collage": (_mole(features="flattened"), OWN_RATE),
    **{f"flow, {name}": (FAMILIES["flow"], training) for name, training in OBJECTIVES.items()},
    **{f"mole block N, {name}": (MOLE, training) for name, training in OBJECTIVES.items()},
    **{f"mole layer linear from {s}, collage": (STARTING, replace(TRAINING, initial=s)) for s in INITIAL},
    **{
        f"{family} at {rate:g}, collage": (FAMILIES[family], replace(TRAINING, lr=rate))
        for family, rates in TRIED.items()
        for rate in rates
        if (family, rate) != ("flow", TRAINING.lr)  # "flow, collage" above
    },
    "mole block 1 at 0.05, collage": (_mole(total="1"), replace(TRAINING, lr=5e-2)),
}


def cells() -> list[tuple[str, str, int]]:
    """(setting, kind, index of the composition), so that an early stop leaves every setting with the same compositions."""
    found = [(setting, kind, i) for i in range(EACH) for kind in KINDS for setting in SETTINGS]
    return found + [(setting, KINDS[1], i) for i in range(EACH, ALL) for setting in MORE]


def path_of(setting: str, concepts: Sequence[str]) -> Path:
    return FOLDER / f"{setting} - {name_of(concepts)}.json"


def cell(world, setting: str, concepts: Sequence[str]) -> dict:
    """Train the gates of one setting for one composition, draw it, and return what is seen and what it took."""
    case, scene = _case(concepts)
    config, training = SETTINGS[setting]
    mixture = attach(world.pipe, {name: world.loras[name] for name in concepts}, config, binding=None)
    start, log = time.process_time(), []
    if training is not None:
        log = _trained(world, mixture, concepts, training)
    seconds = time.process_time() - start
    metrics = emoji_protocol.JudgeMetrics(world, {case.prompt: scene})
    with mixture.trace() as trace:
        images = sample(world.pipe, case.prompt, VALIDATION_SEEDS, **OPTIONS)
    rows = [_row(setting, case, seed, seen) for seed, seen in zip(VALIDATION_SEEDS, metrics(case, images), strict=True)]
    found = {"setting": setting, "rows": rows, "entropy": trace.entropy(), "seconds": seconds, "log": log}
    if training is None:
        found["rows"] += _alone(world, mixture, metrics, case)
    detach(world.pipe)
    return found


def _case(concepts: Sequence[str]):
    split = {kind: emoji.VALIDATION[kind][:ALL] for kind in KINDS}
    return next((case, scene) for case, scene in emoji_protocol.cases(split) if case.concepts == tuple(concepts))


def _trained(world, mixture, concepts: Sequence[str], training: GateTraining) -> list[dict]:
    found, terms = lesson(concepts), dict(training.terms)
    if "collage" in terms and found.styles:
        terms["collage"] = terms["collage"] | {"redraw": REDRAW}
    if terms.keys() & {"denoise", "clip"}:
        found.samples = joint_samples(world, concepts)
    clip = None
    if terms.keys() & {"clip", "rollout"}:
        clip = read_clip(world.folder / "clip", device=world.pipe.device, tokenizer=world.pipe.tokenizer)
    return train_gates(world.pipe, mixture, found, config=replace(training, terms=terms), clip=clip)


def _alone(world, mixture, metrics, case) -> list[dict]:
    """The case with each of its LoRAs alone: what a composition can recover."""
    rows = []
    for name in case.concepts:
        with mixture.fixed({name: 1.0}):
            images = sample(world.pipe, case.prompt, VALIDATION_SEEDS, **OPTIONS)
        seen = zip(VALIDATION_SEEDS, metrics(case, images), strict=True)
        rows += [_row(f"alone {name}", case, seed, row) for seed, row in seen]
    return rows


def _row(arm: str, case, seed: int, seen: Mapping) -> dict:
    return {"arm": arm, "case": case.name, "concepts": list(case.concepts), "kind": case.kind, "seed": seed, **seen}


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may make the file; the claim ends with the process, however that ends."""
    with path.with_suffix(".claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not path.exists()


def make(world, settings: Sequence[str]) -> None:
    """Make every cell of `settings` that does not exist and that no other process is making."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = known()
    for setting, kind, i in cells():
        concepts = emoji.VALIDATION[kind][i]
        path = path_of(setting, concepts)
        if setting not in settings or path.stem in made or path.exists():
            continue
        with claimed(path) as mine, small_attention() if mine else nullcontext():
            if mine:
                found = cell(world, setting, concepts)
                path.with_suffix(".part").write_text(json.dumps(found))
                path.with_suffix(".part").rename(path)
                right = sum(row["success"] for row in found["rows"] if row["arm"] == setting)
                print(f"{path.stem}: {right} of {len(VALIDATION_SEEDS)}, {found['seconds']:.0f} s", flush=True)


def known() -> dict[str, dict]:
    """Name -> cell: the packed ones, and those made since, which take precedence."""
    packed = json.loads(gzip.decompress(PACKED.read_bytes())) if PACKED.exists() else {}
    return packed | {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def pack(cells: Mapping[str, dict]) -> None:
    """Write the cells to rows/, the same bytes for the same cells."""
    PACKED.write_bytes(gzip.compress(json.dumps(cells, sort_keys=True).encode(), mtime=0))


def report() -> str:
    """docs/training_table.md from all cells."""
    found = [cell for _, cell in sorted(known().items())]
    drawn = tables.as_frame([row | {"idle": [], "setting": cell["setting"]} for cell in found for row in cell["rows"]])
    bounds = shares_seen(drawn[drawn["composer"] == "alone"], own=True)
    reference = {case_of(cell): cell["seconds"] for cell in found if cell["setting"] == REFERENCE}
    body = []
    for setting in SETTINGS:
        cells, rows = [cell for cell in found if cell["setting"] == setting], drawn[drawn["arm"] == setting]
        if cells:
            times = [
                cell["seconds"] / reference[case_of(cell)] for cell in cells if cell["log"] and case_of(cell) in reference
            ]
            body.append([setting, *seen_cells(rows, drawn["kind"].unique(), bounds), *gate_cells(cells, times)])
    head = ["setting", *drawn["kind"].unique(), "in style", "recovery", "entropy", "time"]
    return fill((KEPT.parent / "objectives_text.md").read_text(), {"cells": tables.markdown(head, body)})


def seen_cells(rows: pd.DataFrame, kinds: Sequence[str], bounds: pd.Series) -> list[str]:
    """Success by kind, success of pairs in the style that was asked for, and recovery of `bounds`."""
    groups = [rows[rows["kind"] == kind] for kind in kinds]
    shown = [f"{tables.interval(own, 'success')} of {own['case'].nunique()}" for own in groups]
    pairs = rows[rows["kind"] == PAIRS]
    styled = tables.interval(pairs.assign(styled=pairs["success"] & pairs["style"]), "styled")
    recovery = (shares_seen(rows) / bounds[bounds > 0]).clip(upper=1.0).mean()
    return [*shown, styled, "-" if math.isnan(recovery) else f"{recovery:.2f}"]


def gate_cells(cells: Sequence[dict], times: Sequence[float]) -> list[str]:
    """Mean entropy of the gates over ln 2, and the median of `times`."""
    entropy = statistics.mean(cell["entropy"] for cell in cells) / math.log(2)
    return [f"{entropy:.2f}", f"{statistics.median(times):.2f}" if times else "-"]


def shares_seen(rows: pd.DataFrame, *, own: bool = False) -> pd.Series:
    """(case, concept) -> the share of seeds that show the concept; `own`: of rows of the arm "alone CONCEPT" only."""
    seen = [
        {"case": case, "concept": concept, "seen": there}
        for arm, case, found in rows[["arm", "case", "seen"]].itertuples(index=False)
        for concept, there in found.items()
        if not own or arm == f"alone {concept}"
    ]
    return (
        pd.DataFrame(seen, columns=["case", "concept", "seen"])
        .astype({"seen": float})
        .groupby(["case", "concept"])["seen"]
        .mean()
    )


def case_of(cell: dict) -> str:
    return cell["rows"][0]["case"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(SETTINGS), help=f"'report', or of {list(SETTINGS)}; default: all")
    what = parser.parse_args().what
    if unknown := set(what) - {*SETTINGS, "report"}:
        parser.error(f"unknown {sorted(unknown)}; known: {['report', *SETTINGS]}")
    if what != ["report"]:
        make(emoji_world(device=str(device())), what)
    if "report" in what:
        pack(known())
        (DOCS / "training_table.md").write_text(report())


if __name__ == "__main__":
    main()
