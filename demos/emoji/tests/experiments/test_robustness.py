"""The curves of demos/emoji/experiments/robustness.py: what each axis moves, and the rows, table and figure of a run."""

import sys

import pandas as pd
import pytest

import mole_world
from mole_diffusers.mixture import attached
from mole_world import captions, emoji_world
from mole_world.evaluation import emoji_protocol

PAIR = {"two subjects": mole_world.VALIDATION["two subjects"][:1]}


@pytest.fixture(scope="module")
def robustness(script):
    return script("robustness")


@pytest.fixture(scope="module")
def start(robustness):
    setup = emoji_protocol.setup(emoji_world(), {"num_inference_steps": 1, "guidance_scale": 3.0})
    return robustness.starts(setup, PAIR)


def asked(point):
    """All that the pictures of a point depend on."""
    return [
        (case, point.setup.call_of(case), method.name, dict(method.settings(point.setup, case)))
        for case, _ in point.found
        for method in point.methods
    ]


def test_an_axis_passes_through_the_defaults_and_moves_one_thing(robustness, start):
    composed, _ = start
    default = asked(composed)
    for name, axis in robustness.AXES.items():
        settings = [asked(point) for point in axis(composed).values()]
        assert settings.count(default) == 1, name
        assert all(settings), name


def test_the_settings_reach_what_is_drawn(robustness, start):
    composed, known = start
    points = {name: axis(composed) for name, axis in robustness.AXES.items()}
    ((case, _),) = points["strangers"][8].found
    assert len(set(case.experts)) == 8
    ((case, scene),) = points["base_words"][1].found
    assert case.concepts == scene.subjects
    assert (case.concepts[0] in mole_world.words.BASE_SUBJECTS, case.concepts[1]) == (True, composed.found[0][0].concepts[1])
    for method in points["base_words"][1].methods:
        with method.draws(composed.setup, case):
            assert list(attached(composed.setup.pipe).experts) == [case.concepts[1]]
    assert set(points["strength"][0.4].setup.weighted_experts({"fox": 1.0})["fox"][1:]) == {0.4}
    assert points["guidance"][7.0].setup.options["guidance_scale"] == 7.0
    ((case, scene),) = points["size"][1.5].found
    assert case.size == (1.5 * scene.size[0], 1.5 * scene.size[1])
    _, scene = composed.found[0]
    first, second = scene.subjects
    prompts = {name: point.found[0][0].prompt for name, point in points["wording"].items()}
    assert list(prompts.values()) == [
        *(scene.worded(form) for form in range(len(captions.FORMS))),
        f"a drawing in the style of noto showing a {first} beside an {second}",
        f"noto drawing of an {second} and a {first}",
        f"noto drawing of a {first} left of an {second}",
    ]
    assert [case.idle for case, _ in robustness.strangers(known)[2].found] == [()]
    assert set(known.found[0][0].concepts) <= set(mole_world.words.BASE_SUBJECTS)


def test_another_sampler_draws_and_the_pipelines_own_comes_back(robustness, start):
    pipe, (composed, _) = start[0].setup.pipe, start
    own, method = pipe.scheduler, robustness.samplers(composed)["Euler a"].methods[0]
    with method.draws(composed.setup, composed.found[0][0]):
        assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
        assert pipe.scheduler.config.prediction_type == own.config.prediction_type
    assert pipe.scheduler is own


@pytest.mark.thorough
def test_a_run_prints_a_table_and_draws_curves_and_a_second_one_draws_nothing_anew(
    robustness, script, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(script("packing"), "FOLDER", tmp_path)
    monkeypatch.setattr(robustness, "WORK", tmp_path)
    monkeypatch.setattr(robustness, "STEPS", 1)
    monkeypatch.setattr(robustness, "SAMPLERS", ("Euler a",))
    options = ["--kinds", "two subjects", "--axes", "samplers", "strength", "--per-kind", "1", "--seeds", "1"]
    monkeypatch.setattr(robustness, "STRENGTHS", (1.0,))
    monkeypatch.setattr(sys, "argv", ["robustness.py", *options])
    robustness.main()
    table = capsys.readouterr().out
    (rows,) = (tmp_path / "robustness" / "validation").glob("*.jsonl")
    drawn = rows.read_text()
    assert len(drawn.splitlines()) == 2 * 4  # two samplers by four methods; strength 1 is the first of them again
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [
        ["| samplers", "DDIM"], ["| samplers", "Euler a"], ["| strength", "1"],
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["robustness.py", *options, "--pack", "--figure", str(tmp_path / "curves.png")])
    robustness.main()
    assert capsys.readouterr().out == table
    assert rows.read_text() == drawn
    assert (tmp_path / "curves.png").exists()
    packed = pd.read_csv(tmp_path / "robustness.csv.gz", dtype={"setting": str})
    assert list(packed["setting"].unique()) == ["DDIM", "Euler a", "1"]
