"""Rows -> markdown tables: success by kind, and what stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from mole_diffusers.evaluation.rows import Row, place
from mole_diffusers.evaluation.statistics import as_table, bootstrap, harmonic_mean

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


def interval(rows: Sequence[Row], value: Value) -> str:
    """Mean and 95 % interval of a value over cases and seeds: "0.52 [0.28, 0.75]"; "-" without rows."""
    groups = [[value(r) for r in group] for group in by(rows, "case").values()]
    if not groups:
        return "-"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(as_table(groups)))


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
    """Each arm's success less that of `against` on the same case and seed, by kind."""
    kinds = list(by(rows, "kind"))
    reference = {place(r): float(r["success"]) for r in rows if r["arm"] == against}
    body = []
    for arm, group in by(together(rows), "arm").items():
        shared = [r for r in group if place(r) in reference]
        if arm != against and shared:
            cells = by(shared, "kind")
            body.append([arm, *(interval(cells.get(kind, []), _less(reference)) for kind in kinds)])
    return markdown([f"arm, less {against}", *kinds], body)


def _less(reference: Mapping[tuple, float]) -> Value:
    return lambda r: float(r["success"]) - reference[place(r)]


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
    """Behind success: per concept the share seen and of the single LoRA's, the harmonic mean over a case's concepts,
    likeness to the artist's drawing, style, background, and subjects in their own place."""
    bounds, body = upper_bounds(rows), []
    for arm, group in by(together(rows), "arm").items():
        body.append([arm, *_behind(group, bounds)])
    head = ["arm", "concepts seen", "recovery", "harmonic mean", "likeness", "style", "background", "own place"]
    return markdown(head, body)


def _behind(rows: Sequence[Row], bounds: dict[tuple[str, str], float]) -> list[str]:
    shares = {
        (case, concept): sum(r["seen"][concept] for r in group) / len(group)
        for case, group in by(rows, "case").items()
        for concept in group[0]["seen"]
    }
    recovered = [min(1.0, share / bounds[at]) for at, share in shares.items() if bounds.get(at)]
    harmonic = [harmonic_mean([share for (c, _), share in shares.items() if c == case]) for case in by(rows, "case")]
    placed = [r for r in rows if r["own_place"] is not None]
    return [
        _mean(list(shares.values())),
        _mean(recovered),
        _mean(harmonic),
        _mean([r["likeness"] for r in rows]),
        _mean([float(r["style"]) for r in rows]),
        _mean([float(r["background"]) for r in rows]),
        _mean([r["own_place"] for r in placed]),
    ]


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


def score_table(rows: Sequence[Row]) -> str:
    """Arms of a real checkpoint: CLIP-T, and CLIP-I and DINO as means over concepts, with intervals over cases and seeds."""
    body = []
    for arm, group in by(together(rows), "arm").items():
        values: list[Value] = [lambda r: r["clip_t"], *(_over_concepts(name) for name in ("clip_i", "dino"))]
        body.append([arm, *(interval(group, value) for value in values)])
    return markdown(["arm", "CLIP-T", "CLIP-I", "DINO"], body)


def _over_concepts(name: str) -> Value:
    return lambda r: sum(r[name].values()) / len(r[name]) if r[name] else float("nan")
