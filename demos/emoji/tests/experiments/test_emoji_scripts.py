"""The scripts of the emoji world import what exists; the long ones are run by hand."""

from pathlib import Path

import pytest

from mole_world import emoji_world

FOLDER = Path(__file__).parents[2] / "experiments"


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
    from mole_world import emoji_world
    from mole_world.evaluation import emoji_protocol

    setup = emoji_protocol.setup(emoji_world(), {})
    kinds = {"two": (("fox", "octopus"),), "styled": (("fox", "ink"),)}
    (two, _), (styled, _) = emoji_protocol.cases(kinds)
    parts = script("compose").parts
    assert two.prompt == "noto drawing of a fox and an octopus"
    assert parts(setup, two) == {
        "fox": ("noto drawing of a fox", (0, 0, 0.5, 1)),
        "octopus": ("noto drawing of an octopus", (0.5, 0, 1, 1)),
    }
    assert parts(setup, styled) == {"fox": (styled.prompt, (0, 0, 1, 1))}


@pytest.mark.thorough
def test_what_is_drawn_over_is_right_where_its_things_stand(script, monkeypatch):
    import diffusers

    from mole_world import Scene

    draw_over, world = script("draw_over"), emoji_world()
    monkeypatch.setattr(draw_over, "STRENGTHS", (0.6,))
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**world.pipe.components, requires_safety_checker=False)
    scene, ways = Scene(("tiger", "koala"), "noto", "green"), list(draw_over.WAYS.values())
    found = []
    for context in ways:
        with context:
            found.append(list(draw_over.kept(world, pipe, scene, range(1))))
    assert found[0] == [True, True]  # whoever is named first
    assert found[1] != [True, True]


@pytest.mark.thorough
def test_strengths_change_while_a_picture_is_drawn_as_if_they_were_set_after_that_step(script, monkeypatch):
    import numpy as np

    import mole_diffusers as mole
    from mole_diffusers.inspection.compare import sample
    from mole_world.evaluation import emoji_protocol

    styles, world = script("styles"), emoji_world()
    monkeypatch.setattr(styles, "STEPS", 4)
    monkeypatch.setitem(styles.WAYS, "late", styles.Way(style=styles.later(1.2, 0.5, first=0.5)))
    setup = emoji_protocol.setup(world, {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"})
    ((case, _),) = emoji_protocol.cases({"subject x style": (("koala", "relief"),)})

    def draw(**options):
        return sample(setup.pipe, case.prompt, [0], **setup.call_of(case), **options)[0]

    pictures = {}
    for name in ("bound", "late"):
        with styles.method(name).draws(setup, case):
            pictures[name] = draw()
    mixture = mole.attach(setup.pipe, {name: setup.experts[name] for name in case.concepts})
    mixture.strength("relief", 0.5)

    def after_step(pipe, step, timestep, state):
        mixture.strength("relief", 0.5 if step + 1 < 2 else 1.2)
        return state

    by_hand = draw(callback_on_step_end=after_step)
    mole.detach(setup.pipe)
    np.testing.assert_allclose(pictures["late"], by_hand, atol=1e-4)
    assert np.abs(pictures["bound"] - by_hand).max() > 0.05


@pytest.mark.thorough
def test_ways_for_styles_are_drawn_and_packed(script, tmp_path, monkeypatch, capsys):
    import pandas as pd

    styles = script("styles")
    monkeypatch.setattr(styles, "WORK", tmp_path)
    monkeypatch.setattr(styles, "STEPS", 1)
    monkeypatch.setattr(script("packing"), "FOLDER", tmp_path)
    options = ["koala+relief", "--seeds", "1", "--ways", "style at 1.2", "the style's deviation at 1.3", "--pack"]
    monkeypatch.setattr("sys.argv", ["styles.py", *options])
    styles.main()
    packed = pd.read_csv(tmp_path / "styles.csv.gz")
    assert packed["method"].tolist() == ["bound", "style at 1.2", "the style's deviation at 1.3"]
    assert packed["style margin"].nunique() == 3
    assert capsys.readouterr().out.count("| style at 1.2 |") == 2  # as it is, and less bound


def test_margins_are_those_written_out(script):
    import torch

    margin = script("styles").margin
    assert margin(torch.tensor([4.0, 1.0, 3.0, 2.5]), [0, 2]) == 0.5
    assert margin(torch.tensor([4.0, 1.0, 3.0, 2.5]), [1]) == -3.0


def test_packed_rows_replace_those_of_the_same_request_and_keep_the_others(script, tmp_path, monkeypatch):
    import pandas as pd

    packing = script("packing")
    monkeypatch.setattr(packing, "FOLDER", tmp_path)
    row = {"setting": "1", "concepts": ["fox", "koala"], "method": "sum", "prompt": "a fox and a koala"}

    def pack(*found):
        rows = pd.DataFrame([row | {"setting": setting, "success": success} for setting, success in found])
        packing.pack("size", rows, ["setting", "concepts", "method"])

    pack(("1", True), ("1.5", True))
    pack(("1", False), ("2", True))
    packed = pd.read_csv(tmp_path / "size.csv.gz", dtype={"setting": str})
    assert list(packed.columns) == ["setting", "concepts", "method", "success"]
    assert packed[["setting", "concepts", "success"]].values.tolist() == [
        ["1.5", "fox+koala", 1], ["1", "fox+koala", 0], ["2", "fox+koala", 1],
    ]  # fmt: skip


@pytest.mark.thorough
def test_a_joint_lora_is_taught_once_and_its_pictures_are_judged_and_packed(script, tmp_path, monkeypatch, capsys):
    import pandas as pd
    from PIL import Image

    joint, world, make = script("joint_lora"), script("check_world"), script("make_loras")
    monkeypatch.setattr(script("packing"), "FOLDER", tmp_path)
    for module in (joint, world):
        monkeypatch.setattr(module, "WORK", tmp_path)
    monkeypatch.setattr(make, "PICTURES", dict.fromkeys(make.PICTURES, 2))
    monkeypatch.setattr(make, "BATCH", dict.fromkeys(make.BATCH, 2))
    monkeypatch.setattr("sys.argv", ["x", "fox+octopus", "--rank", "2", "--updates", "1", "--pictures", "4", "--pack"])
    joint.main()
    file = tmp_path / "joint" / "fox+octopus_r2x1.safetensors"
    made, printed = file.stat().st_mtime_ns, capsys.readouterr().out
    assert [line.rpartition(" ")[2] for line in printed.splitlines()] == ["4", "2"]
    drawn = world.latest()
    for picture in (tmp_path / "pictures").glob("*/*.png"):  # right ones instead, which a second run judges
        scene = joint.scene_of("two subjects", ("fox", "octopus"), int(picture.stem))
        drawn.drawings.picture(scene, seed=int(picture.stem)).save(picture)
        assert drawn.judge.sees(drawn.judge.verdict([Image.open(picture)]), scene.subjects).all()
    joint.main()
    assert file.stat().st_mtime_ns == made
    rows = pd.read_csv(tmp_path / "joint.csv.gz")
    assert rows[["method", "seed", "success"]].values.tolist() == [
        *(["everywhere", i, 1] for i in range(4)), *(["in tiles", i, 1] for i in range(2)),
    ]  # fmt: skip


def test_gates_of_a_composition_are_trained_as_asked_and_kept_once(script, tmp_path, monkeypatch):
    train_gates, seen = script("train_gates"), []

    def trained(pipe, mixture, data, *, config):
        seen.append((mixture.config.gate_type, config.steps, config.width))
        return [{"loss": 0.5}]

    monkeypatch.setattr(train_gates, "train_gates", trained)
    monkeypatch.setattr(train_gates, "note", lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", ["x", "fox+koala", "--gate-type", "factors", "--updates", "7", "--to", str(tmp_path)])
    train_gates.main()
    train_gates.main()
    assert seen == [("factors", 7, 128)]
    assert (tmp_path / "fox+koala" / "gates.safetensors").is_file()


def test_gates_in_the_form_of_moles_paper_fit_the_canvas_of_a_composition(script, tmp_path, monkeypatch):
    train_gates, seen = script("train_gates"), []

    def trained(pipe, mixture, data, *, config):
        pipe(data.composed[0], width=config.width, height=config.height, num_inference_steps=1, output_type="latent")
        seen.append((mixture.config.to_dict(), mixture.binding, dict(config.terms)))
        return [{"loss": 0.5}]

    monkeypatch.setattr(train_gates, "train_gates", trained)
    monkeypatch.setattr(train_gates, "note", lambda *_, **__: None)
    argv = ["x", "fox+koala", "--gate-type", "outputs", "--unbound", "--to", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    train_gates.main()
    gates = {"gate_type": "outputs", "features": "flattened", "area": 2.0}
    assert seen == [(gates, None, {"collage": 1.0, "balance": 0.5})]
