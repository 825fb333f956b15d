"""Rows -> markdown tables: success by kind, and what stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import isnan, nan

import torch

from mole_diffusers.evaluation.rows import Row, place
from mole_diffusers.evaluation.statistics import (
    Resample,
    as_table,
    bootstrap,
    harmonic,
    of_cases,
    of_concepts,
    recovery,
    share,
)

Value = Callable[[Row], float]
Resampled = Callable[[Collection[Sequence[Row]]], Resample]  # the rows of each case -> how cases are resampled


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


def cases_of(groups: Collection[Sequence[Row]]) -> Resample:
    """Cases as if they were independent."""
    return of_cases(len(groups))


def concepts_of(groups: Collection[Sequence[Row]]) -> Resample:
    """The concepts that cases share in their place."""
    return of_concepts([group[0]["concepts"] for group in groups])


def interval(rows: Sequence[Row], value: Value, *, digits: int = 2, resampled: Resampled = cases_of) -> str:
    """Mean and 95 % interval of a value over cases and seeds: "0.52 [0.28, 0.75]"; "-" without rows, or values (NaN)."""
    if not rows:
        return "-"
    groups = by(rows, "case").values()
    table = as_table([[value(r) for r in group] for group in groups])
    return _said(bootstrap(table, resampled(groups)), digits)


def _said(found: tuple[float, float, float], digits: int = 2) -> str:
    mean, low, high = (f"{number:.{digits}f}" for number in found)
    return "-" if isnan(found[0]) else f"{mean} [{low}, {high}]"


def together(rows: Iterable[Row]) -> list[Row]:
    """The arms "alone fox", "alone ink", ... as one arm "alone"."""
    return [row | {"arm": _label(row["arm"])} for row in rows]


def _label(arm: str) -> str:
    return "alone" if arm.startswith("alone ") else arm


def apart(rows: Iterable[Row]) -> list[Row]:
    """Rows of pictures that idle experts were attached for under a kind of their own, "pair, 4 LoRAs"."""
    return [row | {"kind": f"{row['kind']}, {attached(row)} LoRAs"} if row["idle"] else row for row in rows]


def attached(row: Row) -> int:
    """How many experts were attached, the idle ones too."""
    return len(row["concepts"]) + len(row["idle"])


def by_kind(rows: Sequence[Row], table: Callable[[Sequence[Row]], str]) -> str:
    """A table for every kind of case, under its name; of a single kind the table alone."""
    groups = by(apart(rows), "kind")
    return table(rows) if len(groups) == 1 else "\n\n".join(f"{kind}:\n\n{table(own)}" for kind, own in groups.items())


def success(row: Row) -> float:
    """Whether every concept is there."""
    return float(row["success"])


def success_table(rows: Sequence[Row], value: Value = success) -> str:
    """Arms x kinds."""
    rows = apart(rows)
    kinds = list(by(rows, "kind"))
    groups = {arm: by(group, "kind") for arm, group in by(together(rows), "arm").items()}
    body = [[arm, *(interval(group.get(kind, []), value) for kind in kinds)] for arm, group in groups.items()]
    return markdown(["arm", *kinds], body)


def paired_table(rows: Sequence[Row], against: str, *, resampled: Resampled = cases_of) -> str:
    """Each arm's success less that of `against` on the same prompt and noise, by kind."""
    kinds, less = list(by(apart(rows), "kind")), _less(rows, against, success)
    body = []
    for arm, shared in _paired(apart(rows), against).items():
        cells = by(shared, "kind")
        body.append([arm, *(interval(cells.get(kind, []), less, resampled=resampled) for kind in kinds)])
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
    groups: dict[str, list[list[Row]]] = {}
    for arm, own in by(rows, "arm").items():
        groups.setdefault(_label(arm), []).extend(by(own, "case").values())  # each single LoRA on each case by itself
    body = [[arm, *_behind(own, alone)] for arm, own in groups.items()]
    head = ["arm", "concepts seen", "recovery", "harmonic mean", "likeness", "style", "background", "own place"]
    return markdown(head, body)


def _behind(groups: Sequence[Sequence[Row]], alone: Mapping[tuple[tuple, str], bool]) -> list[str]:
    seen, resample = _seen(groups, alone), cases_of(groups)  # [G, S, 2, C]
    rows = [row for group in groups for row in group]
    return [
        _said(bootstrap(seen[:, :, 0], resample, share)),
        _said(bootstrap(seen, resample, recovery)),
        _said(bootstrap(seen[:, :, 0], resample, harmonic)),
        interval(rows, _over_concepts("likeness")),
        *(interval(rows, _field(name)) for name in ("style", "background")),
        interval([r for r in rows if r["own_place"] is not None], _field("own_place")),
    ]


def _field(name: str) -> Value:
    return lambda r: float(r[name])


def _over_concepts(name: str, of: Callable[[str], bool] = lambda concept: True) -> Value:
    """The mean of a field over the concepts that `of` says and that have it; NaN where there is none."""

    def mean(row: Row) -> float:
        values = [value for concept, value in row[name].items() if of(concept)]
        return sum(values) / len(values) if values else nan

    return mean


def _seen(groups: Sequence[Sequence[Row]], alone: Mapping[tuple[tuple, str], bool]) -> torch.Tensor:
    """[G, S, 2, C]: whether each concept is seen, and is by its LoRA alone on the same noise; NaN where there is none."""
    seeds, concepts = max(map(len, groups)), max(len(group[0]["seen"]) for group in groups)
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


SUCCESS: dict[str, Value] = {"success": success}
SEEN: dict[str, Value] = {"subject seen": _field("subjects"), "style seen": _field("style")}
SCORES: dict[str, Value] = {
    "CLIP-T": lambda r: r["clip_t"], "CLIP-I": _over_concepts("clip_i"), "DINO": _over_concepts("dino")
}  # fmt: skip


def dino_by_role(styles: Collection[str]) -> dict[str, Value]:
    """The mean DINO of a case's subjects and that of its styles; NaN where none of them has pictures of its own."""
    return {
        "DINO of subjects": _over_concepts("dino", lambda concept: concept not in styles),
        "DINO of styles": _over_concepts("dino", lambda concept: concept in styles),
    }


def score_table(rows: Sequence[Row]) -> str:
    """Arms of a real checkpoint: CLIP-T, CLIP-I and DINO as means over concepts, with intervals over cases and seeds."""
    groups = by(together(rows), "arm")
    body = [[arm, *(interval(group, value, digits=3) for value in SCORES.values())] for arm, group in groups.items()]
    return markdown(["arm", *SCORES], body)


def paired_scores(rows: Sequence[Row], against: str, *, resampled: Resampled = cases_of) -> str:
    """Each arm's scores less those of `against` on the same prompt and noise."""
    less = [_less(rows, against, value) for value in SCORES.values()]
    paired = _paired(rows, against)
    body = [
        [arm, *(interval(shared, value, digits=3, resampled=resampled) for value in less)] for arm, shared in paired.items()
    ]
    return markdown([f"arm, less {against}", *SCORES], body)
