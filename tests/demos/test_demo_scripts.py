"""The scripts of the emoji world import what exists; the long ones are run by hand."""

import gzip
import json
from pathlib import Path

import pytest

from mole_diffusers.evaluation import tables

EMOJI = Path(__file__).parents[2] / "demos" / "experiments" / "emoji"
ROWS = EMOJI / "studies" / "rows"


@pytest.mark.parametrize("name", sorted(path.stem for path in EMOJI.glob("*/*.py")))
def test_a_script_imports_and_says_what_it_does(script, name):
    if name == "build_atlas":
        pytest.importorskip("resvg_py")  # of the extra `emoji`
    assert script(name).__doc__


def test_every_family_has_its_arms_and_its_place_in_the_report(script):
    arms, report, training = (script(name) for name in ("arms", "report", "train_gates"))
    drawn = {arm.name for arm in arms.families()}
    assert set(report.TRAINED) == drawn & set(report.TRAINED) | {"gates"}
    assert len(report.TRAINED) == len(report.CEILINGS) - 1 == len(training.FAMILIES)


def test_packed_rows_come_back_beside_those_drawn_since(script, monkeypatch, tmp_path):
    from mole_diffusers.evaluation.rows import Rows

    kept = script("kept_rows")
    monkeypatch.setattr(kept, "KEPT", tmp_path / "kept")
    made = [{"case": "a", "kind": "k", "arm": arm, "prompt": "p", "seed": 1, "settings": {}} for arm in ("x", "y")]
    Rows(tmp_path / "first" / "test").append(made[:1])
    kept.pack(Rows(tmp_path / "first" / "test"), "test")
    again = Rows(kept.unpacked(tmp_path / "second" / "test"))
    again.append(made[1:])
    assert sorted(again.read(), key=lambda row: row["arm"]) == made
    again.append([made[0] | {"settings": {"gates": "trained again"}}])
    with pytest.raises(ValueError, match=r"\['x'\] have rows of the same pictures with different settings"):
        kept.pack(again, "test")


def test_packed_rows_hold_one_row_per_picture_of_an_arm():
    """Else a table would count a picture twice, once as it was drawn before its gates or its settings changed."""
    packed = sorted((ROWS).glob("*.jsonl.gz"))
    assert len(packed) == 7
    for path in packed:
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        pictures = {(row["arm"], row["case"], row["prompt"], row["seed"]) for row in rows}
        assert len(pictures) == len(rows), path.name


def test_no_prompt_that_is_evaluated_is_trained_on(script):
    from mole_diffusers import emoji
    from mole_diffusers.evaluation import emoji_protocol

    compose = script("compose")
    cases = [case for split in (emoji.TEST, emoji.VALIDATION) for case, _ in emoji_protocol.cases(split)]
    drawn = {case.prompt for case in cases}
    for case in cases:
        for backgrounds in (("white",), compose.unseen_backgrounds(case.concepts)):
            found = compose.lesson(case.concepts, backgrounds)
            learned = {*found.composed, *found.parts}
            for prompts in (*found.singles.values(), *found.parts.values()):
                learned.update(prompts)
            assert len(found.parts) == len(backgrounds)
            assert not learned & drawn, case.name


def test_a_page_takes_the_numbers_of_its_text_from_its_tables(script):
    fill = script("pages").fill
    table = tables.markdown(["arm", "x + y"], [["sum", "0.14 [0.00, 0.30]"], ["flow, mixed", "-0.10 [-0.20, 0.00]"]])
    text = "{{t}}\n\n{{t: sum, x + y}} or {{t: +sum, x + y}}, {{t: flow,\n  mixed, x + y}}, {{t: +flow, mixed, x + y}}."
    assert fill(text, {"t": table}) == f"{table}\n\n0.14 or +0.14 [0.00, 0.30], -0.10, -0.10 [-0.20, 0.00]."
    for wrong in ("{{u}}", "{{u: sum, x + y}}", "{{t: mean, x + y}}", "{{t: sum, y}}"):
        with pytest.raises(KeyError):
            fill(wrong, {"t": table})


def test_the_tables_are_what_the_packed_rows_give(script, monkeypatch, tmp_path):
    from mole_diffusers.evaluation.rows import Rows

    names = ("evaluate", "report", "families", "objectives", "ablation")
    evaluate, report, families, objectives, ablation = (script(name) for name in names)
    steps = ("world", *evaluate.SPLITS)
    found = {step: report.ordered(Rows(evaluate.unpacked(tmp_path / step)).read()) for step in steps}
    took, measured = (json.loads((ROWS / name).read_text()) for name in ("took.json", "families.json"))
    docs = EMOJI.parents[2] / "docs"
    assert report.document(found, took) == (docs / "results.md").read_text(), (
        "run: python demos/experiments/emoji/studies/evaluate.py report"
    )
    assert families.document(found["test"], measured) == (docs / "families.md").read_text(), "run: families.py"
    monkeypatch.setattr(objectives, "FOLDER", tmp_path)
    assert objectives.report() == (docs / "training_table.md").read_text(), "run: objectives.py report"
    rows, entropy = Rows(evaluate.unpacked(tmp_path / "ablation")).read(), json.loads(ablation.ENTROPY.read_text())
    assert ablation.document(rows, entropy) == (docs / "ablation.md").read_text(), (
        "run: python demos/experiments/emoji/studies/ablation.py report"
    )


@pytest.mark.parametrize("inside", [True, False])
def test_an_ablation_puts_its_weight_in_one_stage_and_quarter_or_everywhere_else(script, inside):
    """By the trace of a picture: what the gates learned is nowhere exactly 1."""
    from mole_diffusers import emoji_world
    from mole_diffusers.evaluation import arms, emoji_protocol

    ablation = script("ablation")
    world = emoji_world()
    bench, folder = emoji_protocol.bench(world, ablation.OPTIONS), arms.gates_of(world.folder / "gates")
    case = emoji_protocol.cases(ablation.SPLITS["gates"][0])[0][0]
    control = ablation.fixed("up_blocks.1", "3 to 5", weight=1.0, inside=inside)
    found = arms.traced(bench, arms.gated("held", folder, inside=control), case).records
    ones = {(place, step) for place, step, weights in found if set(weights.unique().tolist()) <= {0.0, 1.0}}
    there = {(place, step) for place, step, _ in found if place.startswith("unet.up_blocks.1.") and step in (3, 4, 5)}
    assert len(there) == 6 * 3
    assert ones == (there if inside else {(place, step) for place, step, _ in found} - there)
