"""Figures say what the rows say: read back from the axes."""

from functools import partial

import pytest
from PIL import Image

from mole_world.evaluation import emoji_protocol, plots
from mole_world.evaluation.rows import picture_path, save_picture
from mole_world.evaluation.tables import as_frame, estimate

pytest.importorskip("matplotlib")


def row(method, case, seed, **values):
    seen = dict.fromkeys(case.split(" ")[0].split("+"), True) | values.pop("seen", {})
    return {
        "method": method, "case": case, "kind": "pair", "seed": seed, "seen": seen, "success": all(seen.values()),
        "concepts": list(seen), "subjects": 1.0, "style": True, "apart": None, "idle": [], "prompt": "p", "settings": {},
    } | values  # fmt: skip


def lines(figure):
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}


def test_bars_are_the_means_with_their_intervals(tmp_path):
    rows = [row("sum", "a+b", s, seen={"a": s < 3}) for s in range(4)] + [row("alone a", "a+b", 0, seen={"b": False})]
    axes = plots.bars(as_frame(rows), tmp_path / "bars.png").axes[0]
    heights = dict(
        zip([t.get_text() for t in axes.get_xticklabels()], [bar.get_height() for bar in axes.patches], strict=True)
    )
    assert heights == {"sum": 0.75, "alone": 0.0}
    # One case: Wilson's interval of 0 of 1 ends at 1 - 1 / (1 + 1.96 squared). That of 3/4 of a case goes from 0.118 on.
    ends = [[end.tolist() for end in segment] for segment in axes.collections[0].get_segments()]
    assert ends == [[[0, pytest.approx(0.1179, abs=1e-4)], [0, 1]], [[1, 0], [1, pytest.approx(0.7935, abs=1e-4)]]]
    assert axes.get_ylim() == (0, 1)
    assert Image.open(tmp_path / "bars.png").width > 100


def test_bars_have_a_panel_per_value_and_a_colour_per_kind_and_crowd(tmp_path):
    rows = [
        row("sum", "a+b", 0, light=0.2), row("sum", "a+c", 1, light=0.4), row("mean", "a+b", 0, light=-1.0),
        row("sum", "a", 0, light=5.0, kind="one"), row("sum", "a+b (c)", 0, light=7.0, idle=["c"]),
    ]  # fmt: skip
    frame = as_frame(rows).assign(twice=lambda frame: 2 * frame["light"])
    figure = plots.bars(frame, tmp_path / "bars.png", ["light", "twice"], limits=(None, None))
    light, twice = figure.axes
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["pair", "one", "pair, 3 LoRAs"]
    assert [bar.get_height() for bar in light.patches] == pytest.approx([0.3, -1.0, 5.0, 7.0])
    assert [bar.get_height() for bar in twice.patches] == pytest.approx([0.6, -2.0, 10.0, 14.0])
    assert (light.get_ylabel(), twice.get_ylabel()) == ("light", "twice")
    assert twice.get_ylim()[1] > 14


def test_the_frontier_is_a_line_per_method_in_the_order_of_its_shares(tmp_path):
    rows = [
        row("sum @ 0.7", "a+b", 0, subjects=0.0), row("sum @ 0.7", "a+b", 1, subjects=0.5),
        row("sum @ 0.3", "a+b", 0, style=False), row("mean", "a+b", 0, subjects=0.5, style=False),
    ]  # fmt: skip
    found = lines(plots.frontier(emoji_protocol.frame(rows), tmp_path / "frontier.png", emoji_protocol.REPORT.roles))
    assert found == {"sum": [[1.0, 0.0], [0.25, 1.0]], "mean": [[0.5, 0.0]]}


def test_the_frontier_is_of_any_two_values_and_keeps_kinds_apart(tmp_path):
    rows = [row("sum @ 0.5", "a+b", 0, dog=3.0, oil=5.0), row("sum @ 0.5", "a+b+c", 0, dog=7.0, oil=9.0, kind="three")]
    figure = plots.frontier(as_frame(rows), tmp_path / "frontier.png", ("dog", "oil"), limits=(None, None))
    assert [axes.get_lines()[0].get_xydata().tolist() for axes in figure.axes] == [[[3.0, 5.0]], [[7.0, 9.0]]]
    assert [axes.get_title() for axes in figure.axes] == ["pair", "three"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("dog", "oil")


def test_success_against_experts_attached_is_that_of_each_kind(tmp_path):
    rows = [
        row("sum", "a+b", 0), row("sum", "a+b", 1, seen={"a": False}), row("sum", "a+b (c)", 0, idle=["c"]),
        row("sum", "a+b (c) (d)", 0, seen={"a": False}, idle=["c", "d"]), row("sum", "a+b+c", 0, light=0.3, kind="three"),
    ]  # fmt: skip
    pair, three = plots.curves(as_frame(rows), tmp_path / "experts.png", at="attached").axes
    assert pair.get_lines()[0].get_xydata().tolist() == [[2, 0.5], [3, 1.0], [4, 0.0]]
    assert three.get_lines()[0].get_xydata().tolist() == [[3, 1.0]]
    assert pair.get_ylabel() == "success"
    assert (pair.get_xticks().tolist(), three.get_xticks().tolist()) == ([2, 3, 4], [3])
    figure = plots.curves(as_frame(rows[4:]), tmp_path / "light.png", "light", at="attached", limits=(None, None))
    assert lines(figure) == {"sum": [[3, 0.3]]}


def test_curves_stand_at_numbers_or_at_names_in_their_order_with_their_intervals(tmp_path):
    settings = [("size", 1.5), ("size", 1.0), ("words", "own"), ("words", "other"), ("more", 1.0), ("last", 1.0)]
    rows = [
        row(method, "a+b", seed, seen={"a": seed < 3}, axis=axis, setting=setting)
        for axis, setting in settings for method in ("sum", "bound") for seed in range(4 if method == "sum" else 2)
    ]  # fmt: skip
    figure = plots.curves(as_frame(rows), tmp_path / "curves.png", at="setting", panel="axis")
    size, words, more, last = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in size.get_lines()} == {
        "sum": [[1.0, 0.75], [1.5, 0.75]], "bound": [[1.0, 1.0], [1.5, 1.0]],
    }  # fmt: skip
    assert [tick.get_text() for tick in words.get_xticklabels()] == ["own", "other"]
    assert [line.get_xydata().tolist() for line in words.get_lines()] == [  # side by side at each name
        [[-0.05, 0.75], [0.95, 0.75]],
        [[0.05, 1.0], [1.05, 1.0]],
    ]
    own = as_frame(rows).query("axis == 'size' and setting == 1.0 and method == 'sum'")
    _, low, high = estimate(own, "success")
    assert size.collections[0].get_segments()[0].tolist() == [[1.0, low], [1.0, high]]
    assert last.get_position().y0 < size.get_position().y0  # the fourth panel begins another row
    assert [axes.get_title() for axes in (size, more)] == ["size", "more"]


def test_the_sample_grid_has_a_row_per_method_that_has_every_seed(tmp_path):
    rows = [row(method, "a+b", seed) for method in ("sum", "mean") for seed in (1, 2)] + [row("half", "a+b", 1)]
    other = [row("sum", "a+b", 1, prompt="q"), row("sum", "a+b", 1, settings={"num_inference_steps": 3})]
    for r in rows + other:
        colour = (40 * r["seed"], 0, 200 if r["method"] == "sum" else 0) if r not in other else (0, 255, 0)
        save_picture(Image.new("RGB", (8, 8), colour), picture_path(tmp_path, r))
    sheet = plots.sample_grid([*rows, other[0]], tmp_path, tmp_path / "samples.png")
    colours = {
        colour for _, colour in sheet.getcolors(1 << 16) if colour[2] == 200 or (colour[0] in (40, 80) and not colour[1])
    }
    assert {(40, 0, 200), (80, 0, 200), (40, 0, 0), (80, 0, 0)} <= colours
    assert sheet.height < 3 * 128  # two rows of methods, not three
    assert (0, 255, 0) not in {colour for _, colour in sheet.getcolors(1 << 16)}  # neither prompt nor settings mix


def test_an_method_has_one_colour_in_all_panels(tmp_path):
    rows = [row(method, "a+b", 0) for method in ("sum", "gates", "mean @ 0.3", "mean @ 0.7", *"bcdefghijk")]
    rows += [row(method, "a+c", 0, kind="other") for method in ("gates", "mean @ 0.3", "mean @ 0.7")]
    frame = emoji_protocol.frame(rows)
    for draw in (partial(plots.frontier, values=emoji_protocol.REPORT.roles), partial(plots.curves, at="attached")):
        one, other = draw(frame, tmp_path / "x.png").axes
        colours, again = ({line.get_label(): line.get_color() for line in axes.get_lines()} for axes in (one, other))
        assert again == {name: colours[name] for name in again}
        assert len(set(colours.values())) == len(colours)
