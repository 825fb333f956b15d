"""What `mole evaluate` shows of the rows of each protocol: tables that keep kinds apart, and figures of its own values."""

import math
import re
from functools import partial

import pytest

from mole_world.evaluation import checkpoint_protocol, emoji_protocol

EMOJI = emoji_protocol.REPORT


def row(method, case, kind="pair", *, idle=(), seed=0, **values):
    """A row of both protocols; scores as given, by concept."""
    concepts = case.split("+")
    name = case + "".join(f" ({other})" for other in idle)
    return {
        "method": method, "case": name, "concepts": concepts, "idle": list(idle), "kind": kind, "prompt": "p", "seed": seed,
        "success": True, "seen": dict.fromkeys(concepts, True), "subjects": 1.0, "style": True, "background": True,
        "apart": None, "all seen": True, "one scene": True, "in order": None, "another": False,
        "clip_t": 0.25, "dino": {}, "collapse": None, "lpips": None, "ssim": None, "seam": None,
    } | values  # fmt: skip


CROWD = [
    row("sum", "fox+ink"), row("sum", "fox+ink", idle=("hat", "owl"), success=False, clip_t=0.75),
    row("sum", "fox+hat+ink", "three", success=False, clip_t=0.5),
    row("mean", "fox+ink", clip_t=0.5), row("mean", "fox+ink", idle=("hat", "owl"), clip_t=0.5),
    row("mean", "fox+hat+ink", "three", clip_t=0.75),
]  # fmt: skip


def body(table):
    return [[re.split(r" [\[(]", cell)[0] for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]


def test_success_is_told_by_kind_and_by_how_many_are_attached():
    frame = EMOJI.frame(CROWD)
    success, concepts = (body(table(frame)) for table in EMOJI.tables)
    kinds = ["pair", "pair, 4 LoRAs", "three"]
    assert success[0] == ["method", *kinds]
    assert success[2:] == [["sum", "1.00", "0.00", "0.00"], ["mean", "1.00", "1.00", "1.00"]]
    paired = body(EMOJI.tables[0](frame, against="sum"))
    assert paired[0] == ["method, less sum", *kinds]
    assert paired[2:] == [["mean", "0.00", "1.00", "1.00"]]
    assert [line[0] for line in concepts if len(line) == 1 and line[0]] == [f"{kind}:" for kind in kinds]
    assert "idle" in CROWD[1]
    assert CROWD[1]["kind"] == "pair"  # the rows keep their own


def test_scores_are_told_by_kind_and_by_how_many_are_attached():
    report = checkpoint_protocol.report(["ink"])
    frame = report.frame(CROWD)
    (table,), none = report.tables, ["-"] * 3
    less = body(table(frame, against="sum"))
    lines = [line for line in body(table(frame)) if line[0] not in ("", "method", "---")]
    assert lines == [
        ["pair:"], ["sum", *none[:2], "0.250", *none], ["mean", *none[:2], "0.500", *none],
        ["pair, 4 LoRAs:"], ["sum", *none[:2], "0.750", *none], ["mean", *none[:2], "0.500", *none],
        ["three:"], ["sum", *none[:2], "0.500", *none], ["mean", *none[:2], "0.750", *none],
    ]  # fmt: skip
    assert [line[3] for line in less if line[0] == "mean"] == ["0.250", "-0.250", "0.250"]
    assert table(report.frame(CROWD[2:3])).startswith("| method | collapse | DINO | CLIP-T |")  # one kind needs no name


@pytest.mark.parametrize("report", [EMOJI, checkpoint_protocol.report(["ink"])])
def test_differences_are_told_with_cases_and_with_concepts_drawn(report):
    """What one subject decides in three cases is less sure than three cases would be."""
    better, worse = {"success": True, "clip_t": 0.75}, {"success": False, "clip_t": 0.25}
    cases = [f"{subject}+{other}" for subject in ("fox", "hat") for other in ("ink", "oil", "owl")]
    rows = [row("sum", case, **worse) for case in cases]
    rows += [row("mean", case, **(better if case.startswith("fox") else worse)) for case in cases]
    text, less = report.text(rows), partial(report.tables[0], report.frame(rows), against="sum")
    few = "\n\nToo few cases to call any method better, which takes 20: pair (6)."
    assert text.endswith(less(resample="concepts") + few)
    by_cases, by_concepts = text.split("With concepts drawn in the place of the cases that share them")
    assert less() in by_cases
    assert less() not in by_concepts


def test_a_frontier_of_scores_sets_subjects_against_styles(tmp_path):
    """Of cases that ask for both, and have pictures of both."""
    pytest.importorskip("matplotlib")
    rows = [
        row("sum @ 0.3", "fox+ink", dino={"fox": 0.5, "ink": 0.1}),
        row("sum @ 0.7", "fox+ink", dino={"fox": 0.2, "ink": 0.4}),
        row("sum @ 0.3", "fox+owl+ink", dino={"fox": 0.1, "owl": 0.5, "ink": 0.3}),
        row("sum @ 0.3", "hat+ink", dino={"ink": 0.9}), row("sum @ 0.3", "fox+hat", dino={"fox": 0.9, "hat": 0.9}),
    ]  # fmt: skip
    report = checkpoint_protocol.report(["ink"])
    (axes,) = report.draw_frontier(rows, tmp_path / "frontier.png").axes
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [[pytest.approx([0.4, 0.2]), [0.2, 0.4]]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("DINO of subjects", "DINO of styles")
    for nothing in (rows[3:], [row("sum @ 0.3", "fox+hat")]):
        with pytest.raises(ValueError, match="no picture asks for both a subject and a style and has DINO of subjects"):
            report.draw_frontier(nothing, tmp_path / "none.png")
    seen = [row("sum @ 0.3", "fox+ink", subjects=0.5), row("sum @ 0.3", "fox+owl", subjects=0.0)]
    seen = [r | {"concepts": ["sepia" if c == "ink" else c for c in r["concepts"]]} for r in seen]
    (axes,) = EMOJI.draw_frontier(seen, tmp_path / "seen.png").axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[0.5, 1.0]]


def test_the_count_and_the_bars_of_scores_are_of_what_is_measured(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row("sum", "fox+ink", dino={"fox": 0.5, "ink": 0.1}), row("sum", "fox+ink", idle=("hat",), dino={"fox": 0.2}),
        row("sum", "hat+ink", dino={}),
    ]  # fmt: skip
    report = checkpoint_protocol.report(["ink"])
    (axes,) = report.draw_count(rows, tmp_path / "experts.png").axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[2, pytest.approx(0.3)], [3, 0.2]]
    assert axes.get_ylabel() == "DINO"
    panels = report.draw_bars(rows, tmp_path / "bars.png").axes
    assert [panel.get_ylabel() for panel in panels] == ["DINO", "CLIP-T"]  # no row has another
    assert not any(math.isnan(bar.get_height()) for panel in panels for bar in panel.patches)
    with pytest.raises(ValueError, match="no picture has DINO"):
        report.draw_count(rows[2:], tmp_path / "none.png")
    (axes,) = EMOJI.draw_count(CROWD[:2], tmp_path / "success.png").axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[2, 1.0], [4, 0.0]]


def test_the_dino_of_a_role_is_nothing_without_pictures_of_it():
    frame = checkpoint_protocol.frame([row("sum", "fox+ink", dino={"fox": 0.5})], {"ink"})
    assert frame["DINO of subjects"].item() == 0.5
    assert math.isnan(frame["DINO of styles"].item())
