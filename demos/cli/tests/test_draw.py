"""What the commands that draw share: where pictures go, how the base is opened, and every setting of a recipe."""

import json
import shutil

import hosts
import numpy as np
import pytest
from PIL import Image
from single_file import save_single_file
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.model_folders import find_base
from mole_app.studio.names import shared_name
from mole_app.studio.xy_grid import sheet
from mole_cli.mole import NAMED, main, parser

DRAW = ["draw", "a fox <lora:fox:1>", "--steps", "1"]
SLOW = ("index", "retrieve", "merge", "train", "train-lora")


@pytest.fixture(scope="module")
def base(loras, tmp_path_factory):
    """Options for a checkpoint file and its LoRAs."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "config")
    save_single_file(tiny_pipeline(), folder / "dream.safetensors")
    files = ["--base", str(folder / "Dream"), "--base-config", str(folder / "config")]
    return [*files, "--loras", str(loras["fox"].parent), "--device", "cpu"]


def sheet_of(path):
    """What a sheet of pictures says that it shows."""
    with Image.open(path) as image:
        return json.loads(image.info.get(infotext.SHEET, "{}"))


def run(argv, capsys):
    """What a command prints as JSON, and the lines on stderr."""
    assert main([*argv, "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said.err.splitlines()


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_checkpoint_file_in_a_models_folder_by_name(base, tmp_path, capsys):
    facts, said = run([*DRAW, *base, "--dtype", "bfloat16", "--slicing", "--out", str(tmp_path / "a.png")], capsys)
    assert facts["base"].endswith("dream.safetensors")
    assert said[-1].endswith("dream.safetensors: StableDiffusionPipeline, cpu, bfloat16, attention slicing")
    again = ["redraw", str(tmp_path / "a.png"), *base, "--dtype", "bfloat16", "--slicing", "--out", str(tmp_path / "b.png")]
    assert main(again) == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert main([*DRAW, *base[2:], "--base", str(tmp_path / "dreem")]) == 1
    assert "there is no model 'dreem' in" in capsys.readouterr().err
    assert main([*DRAW, *base, "--offload", "model"]) == 1
    assert "offload 'model' keeps what is not used off the GPU, and there is none" in capsys.readouterr().err
    assert main([*DRAW, *base, "--dtype", "int8"]) == 1
    assert "unknown dtype 'int8'; known: float32, float16, bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [name for name, found in parser(*NAMED).commands.items() if "base" in {p.name for p in found.params}]
)
def test_every_command_with_a_base_takes_a_config_for_it(name):
    flags = [flag for option in parser(*NAMED).commands[name].params for flag in option.opts]
    assert flags.count("--base-config") == 1


@pytest.mark.parametrize("asked", [("inspect",), pytest.param(SLOW, marks=pytest.mark.thorough)])
def test_the_config_reaches_the_commands_that_do_not_draw(asked, base, loras, tmp_path, capsys, monkeypatch):
    """Each opens the checkpoint; without the config none of them can, as there is no network."""
    checkpoint, config, cpu = base[:2], base[2:4], base[-2:]
    files = [str(loras["fox"]), str(loras["ink"])]
    shutil.copytree(loras["fox"].parent, tmp_path / "library")
    photo = tmp_path / "photos" / "fox.png"
    photo.parent.mkdir()
    Image.effect_noise((32, 32), 90).convert("RGB").save(photo)
    experts = ["--expert", f"fox={files[0]}", "--expert", f"ink={files[1]}"]
    lesson = ["--prompt", "a fox in ink", "--single", "fox=a fox", "--single", "ink=ink", "--steps", "1", "--batch", "1"]
    own = ["--own", "fox=a fox", "--own", "ink=ink"]
    commands = {
        "index": ["index", str(tmp_path / "library"), *cpu],
        "retrieve": ["retrieve", "a fox", "--library", str(tmp_path / "library"), *cpu],
        "inspect": ["inspect", files[0]],
        "merge": ["merge", *files, "--method", "ssr", *own, "--out", str(tmp_path / "merged.safetensors"), *cpu],
        "train": ["train", *experts, *lesson, "--gate-type", "static", "--out", str(tmp_path / "gates"), *cpu],
        "train-lora": ["train-lora", "--data", str(photo.parent), "--trigger", "a fox", "--steps", "1", "--batch", "1",
                       "--out", str(tmp_path / "lora"), *cpu],
    }  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, command in commands.items():
        assert main([*command, *checkpoint]) == 1, name
        assert "give --base-config" in capsys.readouterr().err, name
    for name in asked:
        command = commands[name]
        assert main([*command, *checkpoint, *config]) == 0, (name, capsys.readouterr().err)
        if name.startswith("train"):  # whose settings may be in a file
            file = tmp_path / f"{name}.json"
            assert main([*command, *checkpoint, *config, "--write-config", str(file)]) == 0
            assert main([name, "--config", str(file), "--out", str(tmp_path / name), *cpu]) == 0


def test_every_command_that_draws_opens_the_base_as_asked():
    for name in ("draw", "redraw", "grid", "compose", "compose-library", "app"):
        assert {"device", "base_config", "dtype", "offload", "slicing", "tiling", "compiled"} <= {
            option.name for option in parser(*NAMED).commands[name].params
        }, name


def test_every_command_that_reports_something_does_so_as_json():
    commands = parser(*NAMED).commands
    assert [name for name in commands if "as_json" not in {option.name for option in commands[name].params}] == ["app"]


def test_pictures_are_written_where_it_says_and_over_nothing(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture-2.png").touch()
    assert [run([*DRAW, *base], capsys)[0]["out"] for _ in range(2)] == ["picture.png", "picture-3.png"]
    before = (tmp_path / "picture.png").read_bytes()
    for argv in (DRAW, ["redraw", "picture-2.png"], ["grid", "a fox <lora:fox:1>"], ["compose", "a fox"]):
        assert main([*argv, "--out", "picture.png"]) == 1
        assert "picture.png is there already; give another --out, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "picture.png").read_bytes() == before
    facts, _ = run([*DRAW, *base, "--seed", "3", "--out", "picture.png", "--overwrite"], capsys)
    assert facts["out"] == "picture.png"
    assert infotext.read(tmp_path / "picture.png").seed == 3
    assert main([*DRAW, "--out", str(tmp_path)]) == 1
    assert "is a folder; give the name of a file in it" in capsys.readouterr().err


def test_every_setting_reaches_the_recipe(base, tmp_path, capsys):
    settings = ["--negative", "blur", "--sampler", "euler A", "--width", "43", "--height", "32", "--seed", "-1"]
    settings += ["--prompt-2", "a hat", "--negative-2", "ink"]
    facts, said = run([*DRAW, *base, *settings, "--hires", "1.5", "--steps", "2", "--out", str(tmp_path / "a.png")], capsys)
    assert (facts["negative"], facts["sampler"], facts["width"], facts["height"]) == ("blur", "Euler a", 40, 32)
    assert facts["seed"] >= 0
    assert (facts["hires"], facts["guidance"]) == (1.5, 7.0)
    assert "note: 43 x 32 is rounded to 40 x 32 pixels" in said
    assert (facts["prompt_2"], facts["negative_2"]) == ("a hat", "ink")
    assert "note: StableDiffusionPipeline is drawn without a second prompt" in said
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 48)
    weighed = [DRAW[0], "a (fox:1.5), far in the east <lora:fox:1>", *DRAW[2:], *base, "--out"]
    assert main([*weighed, str(tmp_path / "w.png")]) == 0
    assert main([DRAW[0], "a (fox <lora:fox:1>", *base]) == 1
    assert r"the prompt does not close the ( before 'fox'" in capsys.readouterr().err
    assert main([*DRAW, *base, "--sampler", "best"]) == 1
    assert "unknown sampler 'best'; known: DDIM, Euler" in capsys.readouterr().err


def test_drawing_over_a_picture_and_again(base, tmp_path, capsys):
    Image.effect_noise((48, 32), 90).convert("RGB").save(tmp_path / "photo.png")
    Image.linear_gradient("L").resize((48, 32)).save(tmp_path / "mask.png")
    over = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    out = tmp_path / "over.png"
    facts, _ = run([*DRAW[:2], "--steps", "4", *base, *over, "--strength", "0.5", "--out", str(out)], capsys)
    assert (facts["width"], facts["height"], facts["strength"]) == (48, 32, 0.5)
    again = ["redraw", str(out), *base]
    assert main([*again, *over, "--out", str(tmp_path / "again.png")]) == 0
    assert np.array_equal(pixels(out), pixels(tmp_path / "again.png"))
    assert main([*again, "--out", str(tmp_path / "none.png")]) == 1
    assert "needs the picture that it was made with as its image" in capsys.readouterr().err
    assert main([*DRAW, *base, *over[2:]]) == 1
    assert "--mask shows a part of a picture: give --image" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("<html>")
    assert main([*DRAW, *base, "--image", str(tmp_path / "text.png")]) == 1
    assert "text.png cannot be read as a picture" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["flux", *thorough("sd3")])
def test_a_model_with_a_transformer_draws_and_the_app_says_what_it_lacks(host, tmp_path, monkeypatch, capsys):
    pipe, _ = hosts.HOSTS[host]()
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "loras").mkdir()
    tiny_lora(pipe, tmp_path / "loras" / "fox.safetensors")
    given = ["--base", str(tmp_path / "base"), "--loras", str(tmp_path / "loras"), "--device", "cpu"]
    size = ["--width", "32", "--height", "32"]
    facts, said = run([*DRAW, *given, *size, "--negative", "blur", "--out", str(tmp_path / "a.png")], capsys)
    assert (facts["width"], facts["guidance"]) == (32, 3.5 if host == "flux" else 5.0)
    assert [line for line in said if line.startswith("note")] == (
        ["note: FluxPipeline is drawn without the negative prompt"] if host == "flux" else []
    )
    second = [*DRAW, *given, *size, "--prompt-2", "a hat", "--out"]
    assert main([*second, str(tmp_path / "b.png")]) == 0
    assert not np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "a.png"))
    sheet = ["a fox", "--expert", f"fox={tmp_path / 'loras' / 'fox.safetensors'}", *given[:2], *given[4:], *size]
    sheet += ["--rows", "1", "--steps", "1", "--prompt-2", "a hat"]
    facts, said = run(["compose", *sheet, "--negative", "blur", "--out", str(tmp_path / "c.png")], capsys)
    assert (facts["prompt_2"], sheet_of(tmp_path / "c.png")["prompt_2"]) == ("a hat", "a hat")
    assert ("note: FluxPipeline is drawn without the negative prompt" in said) == (host == "flux")
    pytest.importorskip("gradio")
    monkeypatch.setattr("mole_app.web.build.launch", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    assert main(["app", *given]) == 0
    why = "training on this page needs a UNet" if host == "flux" else f"{type(pipe).__name__} cannot be trained on"
    assert f"note: pictures can be drawn, but {why}" in capsys.readouterr().err


def test_grids_say_what_they_show(base, tmp_path, capsys):
    larger = ["--x", "hires=1,1.5", "--y", "seed=1", "--hires-strength", "0.9", "--steps", "2"]
    facts, _ = run(["grid", "a fox <lora:fox:1>", *base, *larger, "--out", str(tmp_path / "h.png")], capsys)
    assert facts["hires_strength"] == 0.9
    axes = ["--x", "sampler=Euler,UniPC", "--y", "seed=1"]
    facts, _ = run(["grid", "a fox <lora:fox:1>", *base, *axes, "--steps", "1", "--out", str(tmp_path / "g.png")], capsys)
    assert (facts["x"], facts["prompt"]) == ("sampler=Euler,UniPC", "a fox <lora:fox:1>")
    assert sheet_of(tmp_path / "g.png") == {"x": "sampler=Euler,UniPC", "y": "seed=1"}
    assert infotext.read(tmp_path / "g.png").experts == facts["experts"]
    assert main(["redraw", str(tmp_path / "g.png"), *base]) == 1
    assert "g.png is a grid, not a picture; mole grid PROMPT --x 'sampler=Euler,UniPC'" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert sheet_of(tmp_path / "x.png") == {}


def test_an_interrupted_grid_keeps_what_was_drawn(base, tmp_path, monkeypatch, capsys):
    from mole_app.studio.render import Studio

    grid = ["grid", "a fox <lora:fox:1>", *base, "--x", "seed=1,2", "--y", "steps=1", "--out"]
    assert main([*grid, str(tmp_path / "whole.png")]) == 0
    draw, drawn = Studio.draw, []

    def once(*args, **options):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(draw(*args, **options))
        return drawn[0]

    monkeypatch.setattr(Studio, "draw", once)
    assert main([*grid, str(tmp_path / "half.png")]) == 130
    assert "note: 1 of 2 pictures were drawn: " in capsys.readouterr().err
    whole, half = pixels(tmp_path / "whole.png"), pixels(tmp_path / "half.png")
    assert np.array_equal(half[:, :-134], whole[:, :-134])
    assert len(np.unique(half[40:-20, -120:-20].reshape(-1, 3), axis=0)) == 1  # a grey cell


@pytest.mark.thorough
def test_a_grid_draws_over_a_picture(base, tmp_path, capsys):
    """Each cell is what `mole draw` draws over it; its strengths, and those of a larger pass, are axes."""
    Image.effect_noise((70, 40), 90).convert("RGB").save(tmp_path / "photo.png")
    Image.linear_gradient("L").resize((70, 40)).save(tmp_path / "mask.png")
    over = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    given = [DRAW[1], "--steps", "4", *base, *over]
    axes = ["--x", "strength=0.3,0.9", "--y", "seed=1,2"]
    facts, said = run(["grid", *given, *axes, "--out", str(tmp_path / "g.png")], capsys)
    assert "note: 70 x 40 is rounded to 72 x 40 pixels" in said
    assert (facts["width"], facts["height"], infotext.read(tmp_path / "g.png").mask) == (72, 40, facts["mask"])
    drawn = []
    for seed in ("1", "2"):
        for strength in ("0.3", "0.9"):
            out = tmp_path / f"{seed}-{strength}.png"
            run(["draw", *given, "--strength", strength, "--seed", seed, "--out", str(out)], capsys)
            drawn.append(Image.open(out).convert("RGB"))
    wanted = sheet(drawn, ["strength 0.3", "strength 0.9"], ["seed 1", "seed 2"])
    assert np.array_equal(pixels(tmp_path / "g.png"), np.asarray(wanted))
    assert main(["grid", *given, "--x", "strength=0.9,0.1", "--out", str(tmp_path / "none.png")]) == 1
    assert "4 steps at strength 0.1 are none" in capsys.readouterr().err
    larger = [DRAW[1], "--steps", "2", *base, "--hires", "1.5", "--y", "seed=1"]
    facts, _ = run(["grid", *larger, "--x", "hires_strength=0.5,1", "--out", str(tmp_path / "h.png")], capsys)
    assert facts["hires"] == 1.5
    left, right = np.split(pixels(tmp_path / "h.png")[32:, -2 * 134 :], 2, axis=1)  # cells of 128 with a margin of 6
    assert not np.array_equal(left, right)


def test_compose_takes_the_settings_of_a_recipe(loras, base, tmp_path, capsys):
    files = [f"--expert={name}={loras[name]}" for name in ("fox", "ink")]
    where = [base[0], base[1], base[2], base[3], "--device", "cpu", *files, "--rows", "2", "--steps", "1"]
    out = {name: str(tmp_path / f"{name}.png") for name in ("plain", "one", "weighed", "other")}
    plain, _ = run(["compose", "a fox in ink", *where, "--seed", "-1", "--out", out["plain"]], capsys)
    assert plain["base"] == shared_name(str(find_base(base[1])))  # as in recipes, without the folders of this machine
    seed = plain["seeds"][0]
    assert plain["seeds"] == [seed, seed + 1]
    said = {key: value for key, value in plain.items() if key != "out"}
    assert sheet_of(out["plain"]) == {"columns": ["sum", "bound"], **said}
    again = [*where, "--seed", str(seed)]
    run(["compose", "a (fox:1) in ink", *again, "--out", out["one"]], capsys)
    run(["compose", "a (fox:1.6) in ink", *again, "--out", out["weighed"]], capsys)
    other = ["--negative", "blur", "--sampler", "Euler", "--width", "43"]
    facts, _ = run(["compose", "a fox in ink", *again, *other, "--out", out["other"]], capsys)
    assert (facts["sampler"], facts["width"], facts["height"]) == ("Euler", 40, 32)
    assert np.array_equal(pixels(out["plain"]), pixels(out["one"]))
    assert not np.array_equal(pixels(out["plain"]), pixels(out["weighed"]))
    assert not np.array_equal(pixels(out["plain"]), pixels(out["other"]))


def test_what_was_drawn_is_said(loras, tmp_path, capsys):
    """In ComfyUI's folder, whose LoRAs are found without being named: the seed, the size, what each LoRA did, the file."""
    checkpoints, own = tmp_path / "models" / "checkpoints", tmp_path / "models" / "loras"
    checkpoints.mkdir(parents=True)
    own.mkdir()
    for name in ("fox", "hat"):
        shutil.copy(loras[name], own)
    tiny_pipeline().save_pretrained(tmp_path / "config")
    save_single_file(tiny_pipeline(), checkpoints / "dream.safetensors")
    base = ["--base", str(tmp_path / "models"), "--base-config", str(tmp_path / "config"), "--device", "cpu"]
    words = ["draw", "a fox and a hat <lora:fox:0.8> <lora:hat:0.5:unet=1:region=left>", "--seed", "-1", "--steps", "2"]
    assert main([*words, *base, "--out", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().out.splitlines()
    recipe = infotext.read(tmp_path / "a.png")
    assert said[0] == f"a fox and a hat: seed {recipe.seed}, 32 x 32 pixels"
    assert said[1].startswith("fox at 0.8, ")
    assert said[2].startswith(
        "hat at 1 (text encoder 0.5), in a place of its own, 50% of the picture: you gave it the region"
    )
    assert said[3:] == [str(tmp_path / "a.png")]
