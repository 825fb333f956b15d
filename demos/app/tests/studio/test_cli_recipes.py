"""Pictures that re-create themselves, and grids, from the command."""

import asyncio
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

import mole_world
from mole_app.studio import infotext
from mole_app.studio.recipe import FORMAT, VERSION, Recipe, load
from mole_app.studio.xy_grid import cells, parse_axis, sheet
from mole_cli.mole import main

TAGS = "relief drawing of a fox <lora:fox:1> <lora:relief:0.8:stop=1>"


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_picture_re_creates_itself(tmp_path, capsys):
    first, again = tmp_path / "a.png", tmp_path / "b" / "c.png"
    assert main(["draw", TAGS, "--steps", "2", "--seed", "5", "--out", str(first)]) == 0
    assert main(["redraw", str(first), "--out", str(again), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["seed"], facts["base"], facts["guidance"]) == (5, "emoji", 3.0)
    assert np.array_equal(pixels(first), pixels(again))
    infotext.read(again).save(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == infotext.read(first)


def test_a_prompt_is_explained_before_it_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompt = "a (koala:1.2) and a tiger, relief <lora:koala:1> <lora:tiger:0.8> <lora:relief:0.5:region=left>"
    assert main(["draw", prompt, "--explain"]) == 0
    table = capsys.readouterr().out
    said = "koala   koala   own", "relief  relief  own    you gave it the region 'left'", "no tiles: 'relief' has a region"
    assert all(line in table for line in said)
    assert main(["draw", "a koala", "--explain"]) == 0
    assert "the prompt has no LoRA" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # nothing was drawn


def test_a_recipe_without_a_size_follows_its_prompt_everywhere(tmp_path):
    """A command, the app's page and its API, in the world whose canvas grows with the prompt."""
    pytest.importorskip("gradio")
    from app_client import plain, value_of

    from mole_app.web.actions import Actions
    from mole_app.web.build import build
    from mole_cli.common import first_recipe
    from mole_cli.draw import open_studio

    prompt = "noto drawing of a sunflower and a (doughnut:1.1) <lora:sunflower:1>"
    about = {"format": FORMAT, "version": VERSION, "prompt": prompt, "steps": 1}
    (tmp_path / "r.json").write_text(json.dumps(about))
    assert main(["redraw", str(tmp_path / "r.json"), "--out", str(tmp_path / "a.png")]) == 0
    assert pixels(tmp_path / "a.png").shape == (64, 128, 3)
    studio = open_studio({"base": "emoji", "expert": ()})
    blocks = build(Actions(studio, home=tmp_path / "gates"), first_recipe(studio))
    functions = {event.fn.__name__: event for event in blocks.fns.values() if event.fn}
    shown = plain(functions["load"])(str(tmp_path / "r.json"))
    at = [component.label for component in functions["load"].outputs].index("Width")
    assert shown[at : at + 2] == (0, 0)
    beside = len(functions["script"].inputs) - 4  # the last inputs are the given pictures
    fields = [value_of(field) for field in shown[:beside]]
    assert "width=128,\n    height=64," in plain(functions["script"])(*fields, None, None, None, None)[0]["value"]
    assert "width=128,\n    height=64," in asyncio.run(functions["code"].fn({"prompt": prompt}))


def test_any_base_with_a_folder_of_loras(loras, tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    given = ["--base", str(tmp_path / "base"), "--loras", str(loras["fox"].parent)]
    out = tmp_path / "g.png"
    assert (
        main(["grid", "a <lora:fox:1>", *given, "--x", "weight fox=0,1", "--y", "seed=1", "--steps", "1", "--out", str(out)])
        == 0
    )
    assert "1 x 2 pictures" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.width > 2 * 128
    assert main(["draw", "a <lora:hat:1>", *given, "--steps", "1", "--out", str(tmp_path / "p.png")]) == 0
    assert main(["redraw", str(tmp_path / "p.png")]) == 1
    assert "give it as --base" in capsys.readouterr().err
    one = ["--base", str(tmp_path / "base"), "--expert", f"hat={loras['hat']}"]
    assert main(["draw", "a <lora:hat:1>", *one, "--steps", "1", "--out", str(tmp_path / "q.png")]) == 0
    assert np.array_equal(pixels(tmp_path / "p.png"), pixels(tmp_path / "q.png"))


@pytest.mark.thorough
def test_a_grid_of_one_file_is_that_of_its_folder(loras, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    given = ["--base", str(tmp_path / "base"), "--loras", str(loras["fox"].parent)]
    one = ["--base", str(tmp_path / "base"), "--expert", f"hat={loras['hat']}"]
    axes = ["--x", "weight hat=1", "--y", "seed=1", "--steps", "1", "--out"]
    for name, files in (("r", given), ("s", one)):
        assert main(["grid", "a <lora:hat:1>", *files, *axes, str(tmp_path / f"{name}.png")]) == 0
    assert np.array_equal(pixels(tmp_path / "r.png"), pixels(tmp_path / "s.png"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["grid", TAGS, "--x", "size=1"], "the axis 'size=1' is not KIND=VALUE,VALUE,...; kinds: seed, steps"),
        (["grid", TAGS, "--x", "seed=a"], "seed takes whole numbers, separated by commas"),
        (["redraw", "missing.png"], "missing.png"),
        (["grid", "x", "--base", "somewhere"], "'somewhere' is no file or folder here"),
        (["draw", "x <lora:owl:1>"], "there is no LoRA 'owl'"),
    ],
)
def test_bad_input_is_one_line_and_status_1(argv, message, capsys):
    assert main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


def test_gates_are_named_by_their_folder_too(tmp_path, capsys):
    shutil.copytree(mole_world.default_folder() / "gates" / "sunflower+doughnut", tmp_path / "mine")
    words = "noto drawing of a sunflower and a doughnut <lora:sunflower:1> <lora:doughnut:1>"
    made = ["--gates", str(tmp_path / "mine"), "--steps", "1", "--out", str(tmp_path / "a.png"), "--json"]
    assert main(["draw", words, *made]) == 0
    assert json.loads(capsys.readouterr().out)["gates"] == "mine"
    assert main(["redraw", str(tmp_path / "a.png"), "--trained", str(tmp_path), "--out", str(tmp_path / "b.png")]) == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    (tmp_path / "mine").rename(tmp_path / "sunflower+doughnut")  # the name of an example, which they replace
    capsys.readouterr()
    own = ["--trained", str(tmp_path), "--steps", "1", "--out", str(tmp_path / "c.png"), "--json"]
    assert main(["draw", words, *own]) == 0
    assert json.loads(capsys.readouterr().out)["gates"] == "sunflower+doughnut"


def test_cells_change_along_both_axes():
    x, y = parse_axis("weight fox=0,0.5"), parse_axis("arm=base,gates")
    found = cells(Recipe("a <lora:fox:1:lbw=INS>", gates="mine", gates_sha256="0"), x, y)
    at = [(f"a <lora:fox:{w}:lbw=INS>", arm) for arm in ("base", "gates") for w in ("0", "0.5")]
    assert [(c.prompt, c.arm) for c in found] == at
    gates = cells(found[0], parse_axis("gates=sum,other"), parse_axis("seed=1"))
    assert [(c.gates, c.gates_sha256) for c in gates] == [("sum", ""), ("other", "")]
    samplers = cells(found[0], parse_axis("sampler=default,Euler"), parse_axis("seed=1"))
    assert [c.sampler for c in samplers] == ["", "Euler"]
    assert (x.labels, y.labels) == (["fox 0", "fox 0.5"], ["base", "gates"])


@pytest.mark.thorough
def test_the_largest_grid_can_be_read_again(tmp_path):
    """Of noise, which no PNG makes smaller."""
    noise = Image.merge("RGB", [Image.effect_noise((1024, 512), 200)] * 3)
    columns, labels = [f"fox {i}" for i in range(20)], [f"seed {i}" for i in range(20)]
    whole = sheet([noise] * 400, columns, labels)
    infotext.save(whole, tmp_path / "whole.png", Recipe("a fox"), {"x": "seed=1", "y": "seed=2"})
    assert infotext.read(tmp_path / "whole.png").prompt == "a fox"
    assert 10 << 20 < whole.width * whole.height < 15 << 20
    assert whole.width * whole.height * 3 < infotext.MAX_BYTES
    assert sheet([noise] * 3, columns[:3], labels[:1]).height > 256  # few stay large


def test_strengths_that_change_nothing_are_refused():
    seed = parse_axis("seed=1")
    for axis, changes, said in (
        ("strength=0.6,0.9", {}, "needs a picture that is drawn over"),
        ("hires_strength=0.5,0.9", {"image": "0"}, "hires above 1"),
        ("control_strength=0.5", {"image": "0"}, "an axis of control_strength needs a ControlNet"),
        ("ip_scale=0.5", {"controlnet": "canny"}, "an axis of ip_scale needs an IP-Adapter"),
        ("strength=2", {"image": "0"}, "strength must be in 0.0..1.0, got 2.0"),
    ):
        with pytest.raises(ValueError, match=said):
            cells(Recipe("a", **changes), seed, parse_axis(axis))
    assert cells(Recipe("a", hires=2.0), parse_axis("hires_strength=0.5,0.9"), seed)[1].hires_strength == 0.9
    assert cells(Recipe("a", controlnet="canny"), parse_axis("control_end=0.5,0.9"), seed)[1].control_end == 0.9


def test_random_seeds_are_no_axis():
    with pytest.raises(ValueError, match="'seed=-1,5': name the seeds, such as seed=1,2,3"):
        parse_axis("seed=-1,5")
    assert parse_axis("weight fox=-1,5").labels == ["fox -1", "fox 5"]


def test_a_grid_varies_the_binding():
    axis = parse_axis("binding=bound,tiles")
    assert [cell.binding for cell in cells(Recipe("a"), axis, parse_axis("seed=1"))] == ["bound", "tiles"]
    with pytest.raises(ValueError, match="unknown arm 'tiles' .* known bindings: "):
        cells(Recipe("a"), parse_axis("arm=sum,tiles"), parse_axis("seed=1"))


def test_two_axes_of_one_kind_are_refused():
    for x, y in (("weight Fox=0,1", "weight fox=1,2"), ("seed=1", "seed=2,3")):
        with pytest.raises(ValueError, match="both axes vary"):
            cells(Recipe("a <lora:fox:1>"), parse_axis(x), parse_axis(y))
    recipe = Recipe("a <lora:fox:1> <lora:owl:1>")
    (cell,) = cells(recipe, parse_axis("weight fox=0"), parse_axis("weight owl=0"))
    assert cell.prompt == "a <lora:fox:0> <lora:owl:0>"


def test_a_grid_that_was_stopped_keeps_what_is_done():
    x, y = parse_axis("seed=1,2"), parse_axis("steps=1")
    red = Image.new("RGB", (64, 64), "red")
    half = sheet([red], x.labels, y.labels)
    assert half.size == sheet([red, red], x.labels, y.labels).size
    colours = {colour for _, colour in half.getcolors(100000)}
    assert {(255, 0, 0), (221, 221, 221)} <= colours
