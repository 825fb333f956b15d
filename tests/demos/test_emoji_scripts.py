"""The scripts of the emoji world import what exists; the long ones are run by hand."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "demos" / "experiments" / "emoji"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_script_imports_and_says_what_it_does(script, name):
    if name == "data":
        pytest.importorskip("resvg_py")  # of the extra `emoji`
    assert script(name).__doc__


def test_a_lora_is_trained_on_canvases_in_turn_and_taken_off_again(script, pipe, draw):
    import torch

    from mole_diffusers.training.data import Samples

    make = script("make_loras")
    base = draw(pipe)
    shapes = {"one": (16, 16), "wide": (16, 32), "tall": (32, 16)}
    samples = {shape: Samples(torch.randn(4, 4, *side), ["a fox"] * 4) for shape, side in shapes.items()}
    tensors = make.train(pipe, samples, make.Recipe(rank=2, steps=5), 2.0)
    assert {key.split(".")[0] for key in tensors} == {"unet"}
    assert any(value.abs().max() > 0 for key, value in tensors.items() if "lora_B" in key)
    assert torch.equal(draw(pipe), base)


def test_each_subject_has_a_prompt_and_a_square_of_its_own(script):
    import mole_diffusers as mole
    from mole_diffusers.evaluation import emoji_protocol

    setup = emoji_protocol.setup(mole.emoji_world(), {})
    kinds = {"two": (("fox", "octopus"),), "styled": (("fox", "ink"),)}
    (two, _), (styled, _) = emoji_protocol.cases(kinds)
    parts = script("compose").parts
    assert two.prompt == "noto drawing of a fox and an octopus on a blue background"
    assert parts(setup, two) == {
        "fox": ("noto drawing of a fox on a blue background", (0, 0, 0.5, 1)),
        "octopus": ("noto drawing of an octopus on a blue background", (0.5, 0, 1, 1)),
    }
    assert parts(setup, styled) == {"fox": (styled.prompt, (0, 0, 1, 1))}


@pytest.mark.thorough
def test_what_is_drawn_over_is_right_where_its_things_stand(script, monkeypatch):
    import diffusers

    import mole_diffusers as mole
    from mole_diffusers.emoji import Scene

    draw_over, world = script("draw_over"), mole.emoji_world()
    monkeypatch.setattr(draw_over, "STRENGTHS", (0.6,))
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**world.pipe.components, requires_safety_checker=False)
    scene, ways = Scene(("tiger", "koala"), "noto", "green"), list(draw_over.WAYS.values())
    found = []
    for context in ways:
        with context:
            found.append(list(draw_over.kept(world, pipe, scene, range(1))))
    assert found[0] == [True, True]  # whoever is named first
    assert found[1] != [True, True]


def test_strengths_change_while_a_picture_is_drawn_and_margins_are_those_written_out(script, monkeypatch):
    import torch

    import mole_diffusers as mole
    from mole_diffusers.evaluation import emoji_protocol

    styles, world = script("styles"), mole.emoji_world()
    monkeypatch.setattr(styles, "STEPS", 4)
    ((case, _),) = emoji_protocol.cases({"subject x style": (("koala", "relief"),)})
    bound, silent, late = styles.Way(), styles.Way(late=(1, 0)), styles.Way(early=(1, 0), since=0.5)
    assert [late.at(step) for step in range(4)] == [(1, 0), (1, 0), (1, 1), (1, 1)]
    pictures = [styles.draw(world, case, way, 0).tobytes() for way in (bound, silent, late, bound)]
    assert pictures[0] == pictures[3]
    assert len(set(pictures)) == 3
    assert styles.margin(torch.tensor([4.0, 1.0, 3.0, 2.5]), [0, 2]) == 0.5
    assert styles.margin(torch.tensor([4.0, 1.0, 3.0, 2.5]), [1]) == -3.0


def test_packed_verdicts_are_those_of_the_rows_and_of_one_world_only(script, tmp_path, monkeypatch):
    import pandas as pd

    compose = script("compose")
    monkeypatch.setattr(compose, "WORK", tmp_path)
    monkeypatch.setattr(compose, "DOCS", tmp_path)
    (tmp_path / "results").mkdir()
    row = {"case": "fox+ink 64x64", "kind": "subject x style", "concepts": ["fox", "ink"], "arm": "sum", "prompt": "a fox"}
    rows = [row | {"seed": seed, "settings": {"base": "one"}, "success": seed == 2} for seed in (2, 1)]
    kept = compose.Rows(tmp_path / "compose" / "test")
    kept.append(rows)
    compose.pack("test")
    packed = pd.read_csv(tmp_path / "results" / "test.csv.gz")
    assert packed[["concepts", "seed", "success"]].values.tolist() == [["fox+ink", 1, 0], ["fox+ink", 2, 1]]
    kept.append([rows[0] | {"settings": {"base": "another"}}])
    with pytest.raises(ValueError, match="rows of several worlds"):
        compose.pack("test")


def test_gates_of_a_composition_are_trained_as_asked_and_kept_once(script, tmp_path, monkeypatch):
    train_gates, seen = script("train_gates"), []

    def trained(pipe, mixture, data, *, config):
        seen.append((mixture.config.family, config.steps, config.width))
        return [{"loss": 0.5}]

    monkeypatch.setattr(train_gates, "train_gates", trained)
    monkeypatch.setattr(train_gates, "note", lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", ["x", "fox+koala", "--family", "factors", "--updates", "7", "--to", str(tmp_path)])
    train_gates.main()
    train_gates.main()
    assert seen == [("factors", 7, 128)]
    assert (tmp_path / "fox+koala" / "gates.safetensors").is_file()
