"""Rows -> markdown tables: success by kind, and what stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan, nan

import torch

from mole_diffusers.evaluation.rows import Row, place
from mole_diffusers.evaluation.statistics import as_table, bootstrap, harmonic, recovery, share

Value = Callable[[Row], float]


def by(rows: Iterable[Row], name: str) -> dict[str, list[Row]]:
    """Rows grouped by one field, in order of first sight."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row[name], []).append(row)
    return out


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(rows: Sequence[Row], value: Value, *, digits: int = 2) -> str:
    """Mean and 95 % interval of a value over cases and seeds: "0.52 [0.28, 0.75]"; "-" without rows, or values (NaN)."""
    groups = [[value(r) for r in group] for group in by(rows, "case").values()]
    return _said(bootstrap(as_table(groups)), digits) if groups else "-"


def _said(found: tuple[float, float, float], digits: int = 2) -> str:
    mean, low, high = (f"{number:.{digits}f}" for number in found)
    return "-" if isnan(found[0]) else f"{mean} [{low}, {high}]"


def together(rows: Iterable[Row]) -> list[Row]:
    """The arms "alone fox", "alone ink", ... as one arm "alone"."""
    return [row | {"arm": "alone"} if row["arm"].startswith("alone ") else row for row in rows]


def success_table(rows: Sequence[Row], value: Value = lambda r: float(r["success"])) -> str:
    """Arms x kinds."""
    kinds = list(by(rows, "kind"))
    groups = {arm: by(group, "kind") for arm, group in by(together(rows), "arm").items()}
    body = [[arm, *(interval(group.get(kind, []), value) for kind in kinds)] for arm, group in groups.items()]
    return markdown(["arm", *kinds], body)


def paired_table(rows: Sequence[Row], against: str) -> str:
    """Each arm's success less that of `against` on the same prompt and noise, by kind."""
    kinds, less = list(by(rows, "kind")), _less(rows, against, lambda r: float(r["success"]))
    body = []
    for arm, shared in _paired(rows, against).items():
        cells = by(shared, "kind")
        body.append([arm, *(interval(cells.get(kind, []), less) for kind in kinds)])
    return markdown([f"arm, less {against}", *kinds], body)


def _paired(rows: Sequence[Row], against: str) -> dict[str, list[Row]]:
    """Every other arm -> those of its rows that `against` has too."""
    there = {place(r) for r in rows if r["arm"] == against}
    shared = [r for r in together(rows) if place(r) in there and r["arm"] != against]
    return by(shared, "arm")


def _less(rows: Sequence[Row], against: str, value: Value) -> Value:
    reference = {place(r): value(r) for r in rows if r["arm"] == against}
    return lambda r: value(r) - reference[place(r)]


def upper_bounds(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """(case, concept) -> share of seeds in which that concept's LoRA alone shows it on the whole prompt."""
    bounds = {}
    for row_arm, group in by(rows, "arm").items():
        concept = row_arm.removeprefix("alone ")
        if concept != row_arm:
            for case, own in by(group, "case").items():
                bounds[case, concept] = sum(r["seen"][concept] for r in own) / len(own)
    return bounds


def concept_table(rows: Sequence[Row]) -> str:
    """Behind success: per concept the share seen and of the single LoRA's on the same seeds, the harmonic mean over a case's
    concepts, likeness to the artist's drawing, style, background, and subjects in their own place."""
    alone = {(place(r), c): r["seen"][c] for r in rows for c in r["seen"] if r["arm"] == f"alone {c}"}
    body = [[arm, *_behind(group, alone)] for arm, group in by(together(rows), "arm").items()]
    head = ["arm", "concepts seen", "recovery", "harmonic mean", "likeness", "style", "background", "own place"]
    return markdown(head, body)


def _behind(rows: Sequence[Row], alone: Mapping[tuple[tuple, str], bool]) -> list[str]:
    seen = _seen(rows, alone)  # [G, S, 2, C]
    return [
        _said(bootstrap(seen[:, :, 0], share)),
        _said(bootstrap(seen, recovery)),
        _said(bootstrap(seen[:, :, 0], harmonic)),
        *(interval(rows, _field(name)) for name in ("likeness", "style", "background")),
        interval([r for r in rows if r["own_place"] is not None], _field("own_place")),
    ]


def _field(name: str) -> Value:
    return lambda r: float(r[name])


def _seen(rows: Sequence[Row], alone: Mapping[tuple[tuple, str], bool]) -> torch.Tensor:
    """[G, S, 2, C]: whether each concept is seen, and is by its LoRA alone on the same noise; NaN where there is none."""
    groups = list(by(rows, "case").values())
    seeds, concepts = max(map(len, groups)), max(len(r["seen"]) for r in rows)
    table = torch.full((len(groups), seeds, 2, concepts), torch.nan)
    for g, group in enumerate(groups):
        for s, row in enumerate(group):
            for c, (concept, seen) in enumerate(row["seen"].items()):
                table[g, s, :, c] = torch.tensor([float(seen), float(alone.get((place(row), concept), torch.nan))])
    return table


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "-"


def case_table(rows: Sequence[Row]) -> str:
    """Every case x arm, share of its seeds."""
    arms = list(by(together(rows), "arm"))
    body = []
    for case, group in by(together(rows), "case").items():
        found = by(group, "arm")
        body.append([case, *(_mean([float(r["success"]) for r in found.get(arm, [])]) for arm in arms)])
    return markdown(["case", *arms], body)


def _over_concepts(name: str) -> Value:
    return lambda r: sum(r[name].values()) / len(r[name]) if r[name] else nan


SCORES: dict[str, Value] = {
    "CLIP-T": lambda r: r["clip_t"], "CLIP-I": _over_concepts("clip_i"), "DINO": _over_concepts("dino")
}  # fmt: skip


def score_table(rows: Sequence[Row]) -> str:
    """Arms of a real checkpoint: CLIP-T, and CLIP-I and DINO as means over concepts, with intervals over cases and seeds."""
    groups = by(together(rows), "arm")
    body = [[arm, *(interval(group, value, digits=3) for value in SCORES.values())] for arm, group in groups.items()]
    return markdown(["arm", *SCORES], body)


def paired_scores(rows: Sequence[Row], against: str) -> str:
    """Each arm's scores less those of `against` on the same prompt and noise."""
    less = [_less(rows, against, value) for value in SCORES.values()]
    paired = _paired(rows, against)
    body = [[arm, *(interval(shared, value, digits=3) for value in less)] for arm, shared in paired.items()]
    return markdown([f"arm, less {against}", *SCORES], body)
