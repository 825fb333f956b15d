"""Figures of an evaluation, saved and returned. They need matplotlib, in the extra `evaluate`.

Rows are a table as from `tables.as_frame`; values are names of its columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from mole_diffusers.inspection import COLOURS, image_grid
from mole_world.evaluation.rows import Row, picture_of, save_picture
from mole_world.evaluation.tables import estimate

Limits = tuple[float | None, float | None]  # of an axis; None is the end of the values
ACROSS = 3  # panels side by side
TURNED: dict[str, Any] = {"rotation": 40, "ha": "right"}  # long names below an axis


def save_figure(figure: Any, path: Path) -> Any:
    """Save a matplotlib figure, creating its folder first. Returns the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return figure


def bars(rows: pd.DataFrame, path: Path, values: Sequence[str] = ("success",), *, limits: Limits = (0, 1)) -> Any:
    """Means of every method by kind with 95 % intervals, one panel per value."""
    from matplotlib.figure import Figure

    methods, kinds = list(rows["composer"].unique()), list(rows["group"].unique())
    figure = Figure((2 + 0.55 * len(methods), 1 + 3 * len(values)), layout="constrained")
    panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(kinds)
    for axes, value in zip(panels, values, strict=True):
        for k, (kind, own) in enumerate(rows.groupby("group", sort=False)):
            beside = (k - (len(kinds) - 1) / 2) * width
            found = [
                (methods.index(method) + beside, *estimate(cell, value))
                for method, cell in own.groupby("composer", sort=False)
            ]
            at, means, lows, highs = zip(*found, strict=True)
            axes.bar(at, means, width, color=COLOURS[k % len(COLOURS)], label=kind)
            axes.vlines(at, lows, highs, color="#444444", linewidth=1)
        axes.set_ylim(*limits)
        axes.set_ylabel(value)
    panels[-1].set_xticks(range(len(methods)), methods, **TURNED)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return save_figure(figure, path)


def frontier(rows: pd.DataFrame, path: Path, values: tuple[str, str], *, limits: Limits = (0, 1)) -> Any:
    """The styles' value against the subjects', one line per method as its strength moves, one panel per kind.

    Methods named "NAME @ SHARE" are points of one line. Other methods are single points.

    Args:
        values: that of subjects, then that of styles.
    """
    names = rows["composer"].str.partition(" @ ")
    rows = rows.assign(line=names[0], share=names[2].replace("", "0").astype(float))
    figure, panels = _panels(rows, "group")
    colours = _colours(rows["line"])
    for axes, own in panels:
        for name, line in own.groupby("line", sort=False):
            subjects, styles = (line.groupby("share")[value].mean() for value in values)
            axes.plot(subjects, styles, "o-", color=colours[name], label=name, markersize=4, clip_on=False)
        axes.set(xlabel=values[0], ylabel=values[1], xlim=limits, ylim=limits)
        axes.legend(fontsize=7)
    return save_figure(figure, path)


def curves(
    rows: pd.DataFrame,
    path: Path,
    value: str = "success",
    *,
    at: str,
    line: str = "composer",
    panel: str = "kind",
    limits: Limits = (0, 1),
) -> Any:
    """Means of a value with 95 % intervals against the column `at`, one line per `line`, one panel per `panel`.

    Numbers are placed by value; names are side by side, in the order of the panel's rows, and at each name the lines are a
    little apart, so that intervals do not cover one another.
    """
    figure, panels = _panels(rows, panel)
    colours = _colours(rows[line])
    for axes, own in panels:
        ticks = list(dict.fromkeys(own[at]))
        named = isinstance(ticks[0], str)
        places = {tick: i if named else tick for i, tick in enumerate(ticks if named else sorted(ticks))}
        lines = list(own.groupby(line, sort=False))
        for i, (name, cells) in enumerate(lines):
            aside = 0.1 * (i - (len(lines) - 1) / 2) if named else 0.0
            found = sorted((places[tick] + aside, *estimate(cell, value)) for tick, cell in cells.groupby(at))
            x, means, lows, highs = zip(*found, strict=True)
            axes.plot(x, means, "o-", color=colours[name], label=name, markersize=4, clip_on=False)
            axes.vlines(x, lows, highs, color=colours[name], linewidth=1)
        axes.set(xlabel=at, ylabel=value, ylim=limits)
        axes.set_xticks(list(places.values()), list(map(str, places)), **TURNED if named else {})
        axes.legend(fontsize=7)
    return save_figure(figure, path)


def _panels(rows: pd.DataFrame, by: str) -> tuple[Any, list[tuple[Any, pd.DataFrame]]]:
    """A figure with a panel for each kind, three side by side, and each panel's rows. If there are several panels, they
    have titles.
    """
    from matplotlib.figure import Figure

    groups, panels = list(rows.groupby(by, sort=False)), []
    across, down = min(len(groups), ACROSS), -(-len(groups) // ACROSS)
    figure = Figure((5 * across, 4 * down), layout="constrained")
    for i, (kind, own) in enumerate(groups):
        axes = figure.add_subplot(down, across, i + 1)
        axes.set_title(kind if len(groups) > 1 else "", fontsize=9)
        panels.append((axes, own))
    return figure, panels


def _colours(names: Iterable[str]) -> dict[str, Any]:
    """Name -> its colour in every panel, in order of first appearance. With more than twenty names, some share a colour."""
    import matplotlib

    found = list(dict.fromkeys(names))
    many = matplotlib.colormaps["tab20"]
    palette = COLOURS if len(found) <= len(COLOURS) else [many(i) for i in range(many.N)]
    return {name: palette[i % len(palette)] for i, name in enumerate(found)}


def sample_grid(rows: Sequence[Row], folder: Path, path: Path) -> Image.Image:
    """The pictures in `folder` of the first case and prompt: a row per method that has every seed, a column per seed."""
    shown = [row for row in rows if (row["case"], row["prompt"]) == (rows[0]["case"], rows[0]["prompt"])]
    seeds = sorted({row["seed"] for row in shown})
    methods: dict[str, dict[int, Row]] = {}
    for row in shown:
        methods.setdefault(row["method"], {})[row["seed"]] = row
    methods = {method: found for method, found in methods.items() if set(found) == set(seeds)}
    pictures = [[picture_of(folder, found[seed]) for seed in seeds] for found in methods.values()]
    sheet = image_grid(pictures, [f"seed {seed}" for seed in seeds], list(methods))
    save_picture(sheet, path)
    return sheet
