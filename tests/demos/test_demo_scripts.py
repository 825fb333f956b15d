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
    composers, report, training = (script(name) for name in ("composers", "report", "train_gates"))
    drawn = {arm.name for arm in composers.families()}
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
    packed = sorted(ROWS.glob("*.jsonl.gz"))
    assert len(packed) == 8
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


@pytest.mark.parametrize(
    "page",
    [
        "training_table",
        "families",
        "bind",
        pytest.param("results", marks=pytest.mark.thorough),
        pytest.param("ablation", marks=pytest.mark.thorough),
    ],
)
def test_a_page_is_what_the_packed_rows_give(script, monkeypatch, tmp_path, page):
    from mole_diffusers.evaluation.rows import Rows

    evaluate, report, families, objectives, ablation, binding = (
        script(name) for name in ("evaluate", "report", "families", "objectives", "ablation", "binding")
    )

    def packed(step):
        return Rows(evaluate.unpacked(tmp_path / step)).read()

    def kept(name):
        return json.loads((ROWS / name).read_text())

    if page == "training_table":
        monkeypatch.setattr(objectives, "FOLDER", tmp_path)
        text = objectives.report()
    elif page == "families":
        text = families.document(report.ordered(packed("test")), kept("families.json"))
    elif page == "bind":
        text = binding.document(report.ordered(packed("test")), report.ordered(packed("binding")))
    elif page == "results":
        steps = {step: report.ordered(packed(step)) for step in ("world", *evaluate.SPLITS)}
        text = report.document(steps, kept("took.json"))
    else:
        text = ablation.document(packed("ablation"), kept("ablation_entropy.json"))
    assert text == (EMOJI.parents[2] / "docs" / f"{page}.md").read_text(), "make it again, see demos/experiments/emoji"


def test_one_lora_for_all_concepts_is_drawn_as_that_file_and_takes_no_strengths(script, monkeypatch, tmp_path, pipe, loras):
    import mole_diffusers as mole
    from mole_diffusers.evaluation.runner import Case, Setup
    from mole_diffusers.inspection.compare import sample

    composers, case = script("composers"), Case(("fox", "ink"), "pair", "a fox in ink")
    monkeypatch.setattr(composers, "WORK", tmp_path)
    arm, setup, options = composers.joint(), Setup(pipe, {}, {}), {"num_inference_steps": 1}
    assert not arm.covers(case)
    (tmp_path / "joint").mkdir()
    file = tmp_path / "joint" / "fox+ink.safetensors"
    file.write_bytes(loras["fox"].read_bytes())
    assert arm.covers(case)
    mole.attach(pipe, {"fox": loras["fox"]})
    wanted = sample(pipe, case.prompt, [3], **options)[0].tobytes()
    with arm.draws(setup, case):
        assert sample(pipe, case.prompt, [3], **options)[0].tobytes() == wanted
    assert mole.attached(pipe) is None
    before = arm.settings(setup, case)
    file.write_bytes(loras["ink"].read_bytes())
    assert arm.settings(setup, case) != before
    setup.strengths = {"fox": 0.5}
    with pytest.raises(ValueError, match=r"which cannot take strengths of \['fox'\]"), arm.draws(setup, case):
        pass


def drawn_rows(*cells):
    """(arm, {concept: seen}) -> a table of the case fox+ink, seeds counted up."""
    rows = [
        {
            "arm": arm, "case": "fox+ink", "kind": "pair", "concepts": ["fox", "ink"], "idle": [], "prompt": "p", "seed": i,
            "seen": dict(zip(("fox", "ink"), seen, strict=True)), "success": all(seen),
        }
        for i, (arm, *seen) in enumerate(cells)
    ]  # fmt: skip
    return tables.as_frame(rows)


def test_shares_and_bounds_by_hand(script):
    objectives, report = script("objectives"), script("report")
    rows = drawn_rows(
        ("alone fox", True, False), ("alone fox", False, False), ("alone ink", False, True), ("sum", True, True),
        ("sum", False, True), ("mean", True, True),
    )  # fmt: skip
    assert objectives.shares_seen(rows, own=True).to_dict() == {("fox+ink", "fox"): 0.5, ("fox+ink", "ink"): 1.0}
    assert objectives.shares_seen(rows[rows["arm"] == "sum"]).to_dict() == {("fox+ink", "fox"): 0.5, ("fox+ink", "ink"): 1.0}
    assert "| fox+ink | 0.00 | 0.50 | 1.00 |" in report.case_table(rows)


def test_the_settings_of_a_curve_are_what_training_reads(script, monkeypatch, tmp_path):
    import yaml

    from mole_diffusers.cli import main

    curves = script("curves")
    monkeypatch.setattr(curves, "FOLDER", tmp_path)
    asked = curves.settings("collage", curves.CASES[1])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asked))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--write-config", str(tmp_path / "read.yaml")]) == 0
    read = yaml.safe_load((tmp_path / "read.yaml").read_text())
    assert read["experts"].keys() == asked["experts"].keys()
    assert read["lesson"] == asked["lesson"]
    assert read["training"]["terms"] == asked["training"]["terms"]
    assert {name: read["training"][name] for name in ("steps", "batch", "lr")} == {"steps": 60, "batch": 6, "lr": 1e-2}
    assert read["training"]["validation"]["every"] == curves.EVERY


def test_maps_show_their_tables_with_one_scale(script, tmp_path):
    pytest.importorskip("matplotlib")
    shown = {"subject": [[0.0, 0.5], [1.0, 0.25]], "style": [[1.0, 1.0], [0.0, 0.0]]}
    panels = script("ablation").maps(shown, ["down", "up"], ["0-4", "5-9"], tmp_path / "maps.png").axes
    assert [panel.images[0].get_array().tolist() for panel in panels[:2]] == list(shown.values())
    assert {panel.images[0].get_clim() for panel in panels[:2]} == {(0, 1)}
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["down", "up"]


@pytest.mark.parametrize("inside", [True, False])
def test_an_ablation_puts_its_weight_in_one_stage_and_quarter_or_everywhere_else(script, inside):
    """By the trace of a picture: what the gates learned is nowhere exactly 1."""
    from mole_diffusers import emoji_world
    from mole_diffusers.evaluation import arms, emoji_protocol

    ablation = script("ablation")
    world = emoji_world()
    setup, folder = emoji_protocol.setup(world, ablation.OPTIONS), arms.gates_of(world.folder / "gates")
    case = emoji_protocol.cases(ablation.SPLITS["gates"][0])[0][0]
    control = ablation.fixed("up_blocks.1", "3 to 5", weight=1.0, inside=inside)
    found = arms.traced(setup, arms.gated("held", folder, context=control), case).records
    ones = {(place, step) for place, step, weights in found if set(weights.unique().tolist()) <= {0.0, 1.0}}
    there = {(place, step) for place, step, _ in found if place.startswith("unet.up_blocks.1.") and step in (3, 4, 5)}
    assert len(there) == 6 * 3
    assert ones == (there if inside else {(place, step) for place, step, _ in found} - there)
