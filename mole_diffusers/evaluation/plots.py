"""Figures of an evaluation, saved and given back; need matplotlib (the extra `plot`).

Colours are Okabe and Ito's, safe for colour blindness.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mole_diffusers.evaluation.rows import Row
from mole_diffusers.evaluation.runner import keep, picture_path
from mole_diffusers.evaluation.statistics import as_table, bootstrap
from mole_diffusers.evaluation.tables import SEEN, SUCCESS, Value, apart, attached, by, cases_of, together
from mole_diffusers.inspection.figures import grid
from mole_diffusers.patching.denoiser_inputs import DENOISERS
from mole_diffusers.patching.trace import Trace

Limits = tuple[float | None, float | None]  # of an axis; None is where the values end
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def _save(figure: Any, path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return figure


def _panels(rows: Sequence[Row]) -> tuple[Any, list[tuple[Any, list[Row]]]]:
    """A figure, and a panel for every kind with its rows; the kinds are named where they are several."""
    from matplotlib.figure import Figure

    groups = by(rows, "kind")
    figure = Figure((5 * len(groups), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    if len(groups) > 1:
        for axes, kind in zip(panels, groups, strict=True):
            axes.set_title(kind, fontsize=9)
    return figure, list(zip(panels, groups.values(), strict=True))


def _spread(rows: Sequence[Row], value: Value) -> tuple[float, float, float]:
    cases = by(rows, "case").values()
    return bootstrap(as_table([[value(r) for r in case] for case in cases]), cases_of(cases))


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Name -> its colour in every panel."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def bars(rows: Sequence[Row], path: Path, values: Mapping[str, Value] = SUCCESS, *, limits: Limits = (0, 1)) -> Any:
    """The means of every arm by kind with 95 % intervals, one panel per named value."""
    from matplotlib.figure import Figure

    arms, kinds = by(together(apart(rows)), "arm"), list(by(apart(rows), "kind"))
    figure = Figure((2 + 0.55 * len(arms), 1 + 3 * len(values)), layout="constrained")
    panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(kinds)
    for axes, (name, value) in zip(panels, values.items(), strict=True):
        for k, kind in enumerate(kinds):
            cells = [[r for r in group if r["kind"] == kind] for group in arms.values()]
            at = [a + (k - (len(kinds) - 1) / 2) * width for a, cell in enumerate(cells) if cell]
            means, lows, highs = zip(*(_spread(cell, value) for cell in cells if cell), strict=True)
            axes.bar(at, means, width, color=COLOURS[k % len(COLOURS)], label=kind)
            axes.vlines(at, lows, highs, color="#444444", linewidth=1)
        axes.set_ylim(*limits)
        axes.set_ylabel(name)
    panels[-1].set_xticks(range(len(arms)), list(arms), rotation=40, ha="right")
    panels[0].legend(fontsize=8)
    return _save(figure, path)


def heat_map(trace: Trace, path: Path) -> Any:
    """Gate weights of the denoiser, block x step, one panel per expert."""
    from matplotlib.figure import Figure

    spoken = {place: trace.weights(place) for place in trace.places if place.partition(".")[0] in DENOISERS}
    steps = max(map(len, spoken.values()))
    places = [place for place, weights in spoken.items() if len(weights) == steps]  # those that speak at every step
    figure = Figure((3.2 * len(trace.experts), 1.2 + 0.16 * len(places)), layout="constrained")
    panels = figure.subplots(1, len(trace.experts), squeeze=False)[0]
    table = [spoken[place] for place in places]  # places x [steps, N]
    high = max(float(weights.max()) for weights in table)
    for n, (name, axes) in enumerate(zip(trace.experts, panels, strict=True)):
        shown = axes.imshow([w[:, n].tolist() for w in table], aspect="auto", cmap="cividis", vmin=0, vmax=high)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_yticks(range(len(places)), places if n == 0 else [""] * len(places), fontsize=5)
    figure.colorbar(shown, ax=panels[-1])
    return _save(figure, path)


def lines(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, x: str, y: str) -> Any:
    """One line per name through its points, axes named `x` and `y`."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        style = "-" if i < len(COLOURS) else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", color=COLOURS[i % len(COLOURS)], label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(-0.02, 1.02)
    figure.legend(loc="outside right upper", fontsize="small")
    return _save(figure, path)


def maps(tables: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], columns: Sequence[str], path: Path) -> Any:
    """Shares from 0 to 1 as one panel per table, with the same named rows and columns."""
    from matplotlib.figure import Figure

    figure = Figure((2 + 2.6 * len(tables), 1.2 + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for i, ((name, table), axes) in enumerate(zip(tables.items(), panels, strict=True)):
        shown = axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=1)
        axes.set_title(name)
        axes.set_xlabel("steps")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows if i == 0 else [""] * len(rows))
    figure.colorbar(shown, ax=panels[-1])
    return _save(figure, path)


def frontier(rows: Sequence[Row], path: Path, values: Mapping[str, Value] = SEEN, *, limits: Limits = (0, 1)) -> Any:
    """The subjects' value against the styles', one line per arm as its strength moves, a panel per kind.

    Rows of one line have arm names "NAME @ SHARE"; other arms are single points.

    Args:
        values: the name and value of subjects, then of styles.
    """
    (x, _), (y, _) = values.items()
    figure, panels = _panels(apart(rows))
    colours = _colours(row["arm"].partition(" @ ")[0] for row in together(rows))
    for axes, own in panels:
        lines: dict[str, list[tuple[float, ...]]] = {}  # (share, subjects, styles)
        for arm, group in by(together(own), "arm").items():
            name, _, share = arm.partition(" @ ")
            means = (sum(map(value, group)) / len(group) for value in values.values())
            lines.setdefault(name, []).append((float(share or 0), *means))
        for name, points in lines.items():
            _, subjects, styles = zip(*sorted(points), strict=True)
            axes.plot(subjects, styles, "o-", color=colours[name], label=name, markersize=4, clip_on=False)
        axes.set(xlabel=x, ylabel=y, xlim=limits, ylim=limits)
        axes.legend(fontsize=7)
    return _save(figure, path)


def against_count(rows: Sequence[Row], path: Path, values: Mapping[str, Value] = SUCCESS, *, limits: Limits = (0, 1)) -> Any:
    """A named value against the number of experts that are attached, one line per arm, a panel per kind."""
    ((name, value),) = values.items()
    figure, panels = _panels(rows)
    colours = _colours(row["arm"] for row in together(rows))
    for axes, own in panels:
        for arm, group in by(together(own), "arm").items():
            found: dict[int, list[float]] = {}
            for r in group:
                found.setdefault(attached(r), []).append(value(r))
            points = [(count, sum(found[count]) / len(found[count])) for count in sorted(found)]
            axes.plot(*zip(*points, strict=True), "o-", color=colours[arm], label=arm, clip_on=False)
        axes.set(xlabel="experts", ylabel=name, ylim=limits, xticks=sorted({attached(r) for r in own}))
        axes.legend(fontsize=7)
    return _save(figure, path)


def sample_grid(rows: Sequence[Row], folder: Path, path: Path, *, case: str) -> Image.Image:
    """The pictures of one case in `folder`, of its first prompt: a row per arm, a column per seed."""
    shown = list(by([r for r in rows if r["case"] == case], "prompt").values())[0]
    arms = {arm: {r["seed"]: r for r in group} for arm, group in by(shown, "arm").items()}
    seeds = sorted({seed for group in arms.values() for seed in group})
    whole = {arm: group for arm, group in arms.items() if set(group) == set(seeds)}
    pictures = [[_picture(picture_path(folder, group[seed])) for seed in seeds] for group in whole.values()]
    sheet = grid(pictures, [f"seed {seed}" for seed in seeds], list(whole))
    keep(sheet, path)
    return sheet


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
