"""Figures say what the rows say: read back from the axes."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mole_diffusers.evaluation import plots
from mole_diffusers.evaluation.runner import keep, picture_path
from mole_diffusers.state import Decision, State
from mole_diffusers.trace import Trace

pytest.importorskip("matplotlib")


def row(arm, case, seed, **values):
    seen = dict.fromkeys(case.split(" ")[0].split("+"), True) | values.pop("seen", {})
    return {
        "arm": arm, "case": case, "kind": "pair", "seed": seed, "seen": seen, "success": all(seen.values()),
        "subjects": 1.0, "style": True, "idle": [], "prompt": "p", "settings": {},
    } | values  # fmt: skip


def lines(figure):
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}


def test_bars_are_the_means_with_their_intervals(tmp_path):
    rows = [row("sum", "a+b", s, seen={"a": s < 3}) for s in range(4)] + [row("alone a", "a+b", 0, seen={"b": False})]
    axes = plots.bars(rows, tmp_path / "bars.png").axes[0]
    heights = dict(
        zip([t.get_text() for t in axes.get_xticklabels()], [bar.get_height() for bar in axes.patches], strict=True)
    )
    assert heights == {"sum": 0.75, "alone": 0.0}
    assert Image.open(tmp_path / "bars.png").width > 100


def test_the_frontier_is_a_line_per_arm_in_the_order_of_its_shares(tmp_path):
    rows = [
        row("sum @ 0.7", "a+b", 0, subjects=0.0), row("sum @ 0.7", "a+b", 1, subjects=0.5),
        row("sum @ 0.3", "a+b", 0, style=False), row("mean", "a+b", 0, subjects=0.5, style=False),
    ]  # fmt: skip
    found = lines(plots.frontier(rows, tmp_path / "frontier.png"))
    assert found == {"sum": [[1.0, 0.0], [0.25, 1.0]], "mean": [[0.5, 0.0]]}


def test_concepts_seen_against_experts_attached(tmp_path):
    rows = [
        row("sum", "a+b", 0), row("sum", "a+b", 1, seen={"a": False}), row("sum", "a+b+c", 0, seen={"c": False}),
        row("sum", "a+b (c) (d)", 0, seen={"a": False, "b": False}, idle=["c", "d"]),
    ]  # fmt: skip
    found = lines(plots.against_count(rows, tmp_path / "experts.png"))
    assert found == {"sum": [[2, 0.75], [3, pytest.approx(2 / 3)], [4, 0.0]]}


def test_the_heat_map_has_a_row_per_block_and_a_column_per_step(tmp_path):
    state = State([True, True], [1.0, 1.0])
    trace = Trace(["a", "b"], state)
    for step in range(3):
        state.step = step
        for place in ("unet.one", "unet.two"):
            weights = torch.tensor([[step, 2.0], [step, 4.0]]) + (place == "unet.two")
            trace.record(Decision(SimpleNamespace(name=place), (True, True), weights, weights))
    trace.record(Decision(SimpleNamespace(name="text_encoder.x"), (True, True), weights, weights))  # speaks once: no row
    panels = plots.heat_map(trace, tmp_path / "gates.png").axes
    assert panels[0].images[0].get_array().tolist() == [[0, 1, 2], [1, 2, 3]]
    assert panels[1].images[0].get_array().tolist() == [[3, 3, 3], [4, 4, 4]]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["unet.one", "unet.two"]


def test_the_sample_grid_has_a_row_per_arm_that_has_every_seed(tmp_path):
    rows = [row(arm, "a+b", seed) for arm in ("sum", "mean") for seed in (1, 2)] + [row("half", "a+b", 1)]
    other = [row("sum", "a+b", 1, prompt="q"), row("sum", "a+b", 1, settings={"num_inference_steps": 3})]
    for r in rows + other:
        colour = (40 * r["seed"], 0, 200 if r["arm"] == "sum" else 0) if r not in other else (0, 255, 0)
        keep(Image.new("RGB", (8, 8), colour), picture_path(tmp_path, r))
    sheet = plots.sample_grid([*rows, other[0]], tmp_path, tmp_path / "samples.png", case="a+b")
    colours = {
        colour for _, colour in sheet.getcolors(1 << 16) if colour[2] == 200 or (colour[0] in (40, 80) and not colour[1])
    }
    assert {(40, 0, 200), (80, 0, 200), (40, 0, 0), (80, 0, 0)} <= colours
    assert sheet.height < 3 * 128  # two rows of arms, not three
    assert (0, 255, 0) not in {colour for _, colour in sheet.getcolors(1 << 16)}  # neither prompt nor settings mix


def test_maps_show_their_tables_with_one_scale(tmp_path):
    tables = {"subject": [[0.0, 0.5], [1.0, 0.25]], "style": [[1.0, 1.0], [0.0, 0.0]]}
    panels = plots.maps(tables, ["down", "up"], ["0-4", "5-9"], tmp_path / "maps.png").axes
    assert [panel.images[0].get_array().tolist() for panel in panels[:2]] == list(tables.values())
    assert {panel.images[0].get_clim() for panel in panels[:2]} == {(0, 1)}
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["down", "up"]
