"""Tables that can be computed by hand."""

import itertools

import pytest

from mole_world.evaluation import checkpoint_protocol, emoji_protocol, tables


@pytest.mark.parametrize(
    ("better", "worse", "cases", "said"),
    [(19, 0, 19, "too few cases"), (20, 0, 20, "better"), (0, 20, 20, "worse"), (1, 0, 20, "no difference shown")],
)
def test_no_method_is_called_better_for_few_cases_or_a_small_difference(better, worse, cases, said):
    won = [True] * better + [False] * (cases - better)
    lost = [False] * (cases - worse) + [True] * worse
    rows = rows_of(
        *((method, f"a{i}", {"a": x}) for method, all in (("sum", lost), ("mean", won)) for i, x in enumerate(all))
    )
    less = tables.differences(emoji_protocol.frame(rows), "sum", ["success"])
    assert tables.verdict(less, "success", "higher") == said
    other = {"better": "worse", "worse": "better"}.get(said, said)
    assert tables.verdict(less, "success", "lower") == other


def rows_of(*cells):
    """(method, case, {concept: seen}) -> rows, seeds counted up."""
    out = []
    for method, case, seen in cells:
        seed = sum(r["method"] == method and r["case"] == case for r in out)
        out.append(
            {
                "method": method, "case": case, "kind": "pair", "prompt": "p", "seed": seed, "settings": {}, "seen": seen,
                "concepts": case.split("+"), "idle": [],
                "success": all(seen.values()), "subjects": 1.0, "style": True, "background": False,
                "apart": None, "all seen": all(seen.values()), "one scene": True, "in order": None, "another": False,
            }
        )  # fmt: skip
    return out


def test_tables_by_hand():
    rows = rows_of(
        ("alone fox", "fox+ink", {"fox": True, "ink": False}),
        ("alone ink", "fox+ink", {"fox": False, "ink": False}),
        ("sum", "fox+ink", {"fox": True, "ink": True}),
        ("sum", "fox+ink", {"fox": False, "ink": True}),
        ("mean", "fox+ink", {"fox": True, "ink": True}),
        ("mean", "fox+ink", {"fox": True, "ink": True}),
    )
    frame = emoji_protocol.frame(rows)
    _, concept_table = emoji_protocol.REPORT.tables
    lines = concept_table(frame).splitlines()
    assert lines[0] == "| method | all seen | one scene | in order | concepts seen | style | background | another | apart |"
    # One case: Wilson's interval of 1 of 1 starts at 1 / (1 + 1.96 squared).
    one = "1.00 [0.21, 1.00]"
    assert (
        lines[2]
        == f"| alone | 0.00 [0.00, 0.79] | {one} | - | 0.25 (n = 1) | {one} | 0.00 [0.00, 0.79] | 0.00 [0.00, 0.79] | - |"
    )
    assert f"{one} | - | 0.75 (n = 1) | {one} |" in lines[3]  # fox in one of two, ink in both
    assert lines[4].startswith(f"| mean | {one} | {one} | - | 1.00 (n = 1) | {one} |")
    assert "| sum | 0.50 [0.00, 1.00] |" in tables.success_table(frame)
    assert "| mean | 0.50 [-0.41, 1.00] |" in tables.success_table(frame, against="sum")


def test_standing_apart_is_of_the_cases_with_several_subjects():
    rows = rows_of(*[("sum", case, {"a": True}) for case in ("a+b", "a+b", "a+c", "a+ink")])
    for row, value in zip(rows, (True, False, False, None), strict=True):
        row["apart"] = value
    wanted = tables.interval(emoji_protocol.frame(rows[:3]), "apart")
    assert tables.interval(emoji_protocol.frame(rows), "apart") == wanted
    assert wanted.startswith("0.25 [0.00, ")


def test_scores_are_compared_on_the_same_noise():
    """Pictures differ far more than methods do; only the difference on the same noise shows the method."""
    rows = []
    for i, (case, seed) in enumerate(itertools.product(("a", "b", "c"), (1, 2))):
        shared = {"case": case, "concepts": [case], "idle": [], "kind": "one", "prompt": "p", "seed": seed}
        shared |= {"lpips": None, "ssim": None, "collapse": i % 2 == 0}
        rows.append(shared | {"clip_t": 0.1 * i, "seam": 0.0, "dino": {"fox": 0.2 * i, "ink": 0.0}, "method": "sum"})
        better = {"clip_t": 0.1 * i + 0.012, "seam": 0.1 * i, "dino": {"fox": 0.2 * i, "ink": -0.03}}
        rows.append(shared | better | {"method": "gates"})
    odd = shared | {"method": "gates", "case": "d", "concepts": ["d"], "seed": 1}
    rows.append(odd | {"clip_t": 9.0, "seam": 9.0, "dino": {}})
    frame = checkpoint_protocol.frame(rows)
    (table,) = checkpoint_protocol.report(()).tables
    lines = table(frame, against="sum").splitlines()
    assert lines[0] == "| method, less sum | collapse | DINO | CLIP-T | LPIPS | SSIM | seam |"
    # No case of three changed: as likely as not by Wilson's 1.96 squared / (3 + 1.96 squared). Steps of 0.2 between cases
    # have Student's interval 4.303 * 0.2 / sqrt(3).
    assert lines[2:] == [
        "| gates | 0.000 [-0.561, 0.561] | -0.015 (n = 3) | 0.012 (n = 3) | - | - | 0.250 [-0.247, 0.747] |"
    ]
    assert "| sum | 0.250 [" in tables.score_table(frame, ["CLIP-T"])


def test_each_case_counts_once_however_many_seeds_it_has():
    rows = rows_of(("sum", "a", {"a": True}), *(("sum", "b", {"b": seen}) for seen in (False, False, True)))
    mean, low, high = tables.estimate(tables.as_frame(rows), "success")
    assert mean == pytest.approx((1 + 1 / 3) / 2)
    assert 0 <= low < mean < high <= 1
