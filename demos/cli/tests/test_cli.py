"""The `mole` command, as a user calls it."""

import json
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from PIL import Image, ImageChops
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_cli.common import parse_file
from mole_cli.merge import by_name
from mole_cli.merge import merge as merge_files
from mole_cli.mole import NAMED, main, parser
from mole_diffusers import merge, read_expert
from mole_world.world import concept_files

FOX = str(concept_files()["fox"])
RIVALS = Path(__file__).parents[2] / "emoji" / "rivals"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def test_inspect_reports_each_file(loras, base, capsys):
    assert main(["inspect", str(loras["fox"]), str(loras["ink"]), "--base", base, "--json"]) == 0
    fox, ink = json.loads(capsys.readouterr().out)
    assert (fox["format"], fox["ranks"], fox["matched"]) == ("peft", "4", "40 of 40 layers")
    assert ink["parts"] == "unet 40, text_encoder 12"
    assert main(["inspect", str(loras["fox"])]) == 0
    assert "triggers  none stated" in capsys.readouterr().out


def test_inspect_goes_on_after_a_bad_file(loras, tmp_path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"<html>")
    assert main(["inspect", str(tmp_path / "bad.safetensors"), str(loras["fox"]), "--json"]) == 1
    bad, good = json.loads(capsys.readouterr().out)
    assert "is an HTML page" in bad["error"]
    assert good["format"] == "peft"


def test_merge_writes_one_lora(loras, base, tmp_path, capsys):
    out = tmp_path / "one.safetensors"
    files = [str(loras["fox"]), f"{loras['ink']}:0.5"]
    assert main(["merge", *files, "--method", "dare", "--option", "drop=0.5", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["mole.method"], facts["mole.options"]) == ("dare", '{"drop": 0.5}')
    wanted = merge({"fox": loras["fox"], "ink": (loras["ink"], 0.5)}, "dare", drop=0.5)
    found = read_expert(out)
    for key, weights in wanted.layers["unet"].items():
        torch.testing.assert_close(found.layers["unet"][key].delta(), weights.delta(), rtol=0, atol=1e-2)
    prompts = ["--base", base, "--device", "cpu", "--own", "fox=a fox", "--own", "ink=in ink"]
    assert main(["merge", *files, "--method", "ssr", *prompts, "--format", "kohya", "--out", str(out), "--overwrite"]) == 0
    assert read_expert(out).format == "kohya"
    assert "mole.loss" in capsys.readouterr().out


@pytest.mark.thorough
def test_compose_draws_weights_in_tiles(tmp_path, monkeypatch):
    """Its column of tiles is what `mole draw` draws; a word in brackets, or before a comma, names its LoRA."""
    sheets, picture = [], tmp_path / "one.png"
    module = import_module("mole_cli.compose")
    monkeypatch.setattr(module.PromptSheet, "save", lambda page, *_, **__: sheets.append(page.columns))
    prompt = "noto drawing of a (doughnut:1.3), and a Sunflower"
    assert main(["compose", prompt, "--rows", "1", "--steps", "2", "--gates", "sum"]) == 0
    drawn = ["draw", f"{prompt} <lora:doughnut:1> <lora:sunflower:1>", "--gates", "sum", "--binding", "tiles"]
    assert main([*drawn, "--steps", "2", "--seed", "0", "--out", str(picture)]) == 0
    (tiles,) = sheets[0]["tiles"]
    (bound,) = sheets[0]["bound"]
    with Image.open(picture) as wanted:
        assert ImageChops.difference(tiles, wanted.convert("RGB")).getextrema() == ((0, 0),) * 3
        assert ImageChops.difference(bound, wanted.convert("RGB")).getextrema() != ((0, 0),) * 3


def test_compose_on_the_embedded_world(tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    assert main(["compose", "--rows", "1", "--steps", "1", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["experts"] == ["sunflower", "doughnut"]  # as the prompt names them
    assert facts["gates"]["gate_type"] == "sum"  # gates are a column that one asks for
    with Image.open(out) as image:
        assert json.loads(image.text[infotext.SHEET])["columns"] == ["sum", "bound", "tiles", "true drawing"]
        assert image.width > 4 * 128


def test_compose_train_and_compose_again_on_any_pipeline(loras, base, tmp_path, capsys):
    experts = ["--base", base, "--expert", f"fox={loras['fox']}", "--expert", f"ink={loras['ink']}:0.7"]
    train = [*experts, "--prompt", "a fox in ink", "--single", "fox=a fox", "--single", "ink=ink", "--style", "ink"]
    sizes = ["--steps", "2", "--batch", "2", "--gate-type", "mole", "--granularity", "layer", "--total", "1"]
    sizes += ["--term", "single=1,seeds=2,steps=2", "--term", "composed=0.5,seeds=2,steps=2", "--term", "balance=0.5"]
    assert main(["train", *train, *sizes, "--out", str(tmp_path / "g"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {"single", "composed", "balance", "loss"} <= set(row)
    compose = ["compose", "a fox in ink", *experts, "--gates", str(tmp_path / "g"), "--steps", "1", "--rows", "2"]
    assert main([*compose, "--out", str(tmp_path / "x.png")]) == 0
    assert Path(tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compose", "a cat", "--out", "x.png"], "names none of the world's concepts: "),
        (["compose", "a fox", "--rows", "0"], "Invalid value for '--rows'"),
        (["compose", "a fox", "--expert", "fox"], "--expert 'fox' is not NAME=VALUE"),
        (["compose", "a fox", "--expert", "a=x", "--expert", "a=y"], "--expert 'a' is given more than once: ['x', 'y']"),
        (["compose", "a fox", "--expert", "fox=a.safetensors:big"], "strength 'big' is not a number"),
        (["compose", "a fox", "--expert", "fox=missing.safetensors"], "no LoRA file at missing.safetensors"),
        (["compose", "a fox", "--bind", "fox=a fox", "--bind", "fox=an owl"], "--bind 'fox' is given more than once"),
        (["draw", "a fox", "--strength", "0.3"], "--strength says how much of a picture is redrawn: give --image"),
        (["draw", "a fox", "--hires-strength", "0.3"], "--hires-strength says how much of the enlarged picture is"),
        (["draw", "a fox", "--trained", str(Path(__file__).parent)], "has no gates, one folder each"),
        (["compose", "a sunflower", "--bind", "sunflower=@ghost.png"], "there is no file ghost.png"),
        (["redraw", "ghost.png"], "Invalid value for 'picture': file 'ghost.png' does not exist"),
        (["draw", "a fox", "--image", "ghost.png"], "Invalid value for '--image': file 'ghost.png' does not exist"),
        (["draw", "a fox", "--loras", "nowhere"], "Invalid value for '--loras': dir 'nowhere' does not exist"),
        (["draw", "a fox", "--loras", __file__], "test_cli.py' is a file"),
        (["compose", "a fox", "--base", "own/base"], "give at least one --expert"),
        (["merge", "a.safetensors", "b/a.safetensors", "--out", "x.safetensors"], "name one yourself: a2=b/a.s"),
        (["merge", FOX, "--out", "x"], "--out x must be the name of a .safetensors file"),
        (["compose", "a fox", "--out", "new/"], "--out new must be the name of a .png file"),
        (["draw", "a fox", "--out", "a.jpg"], "--out a.jpg must be the name of a .png file"),
        (
            ["merge", "a.safetensors", "--method", "bits", "--out", "x.safetensors"],
            "'bits' is not one of 'sum', 'mean', 'svd'",
        ),
        (["compose", "a fox", "--rows", "x"], "Invalid value for '--rows'"),
        (["compose", "a fox", "--sead", "1"], "No such option: --sead"),
        (["compose", "a <lora:fox:1>"], "a prompt with <lora:...> tags is for mole draw"),
        (["compos"], "No such command 'compos'"),
        (["merge", FOX, "--protect", "fox"], "--protect is for --method np; svd protects no LoRA"),
        (
            ["merge", FOX, "--base", "b", "--device", "cpu", "--own", "fox=x"],
            "svd runs no LoRA and would not read --base, --own, --device, as ssr, regmean, iteris, scalars do",
        ),
        (["merge", "a.safetensors", "--rank", "0"], "Invalid value for '--rank'"),
        (["merge", "a.safetensors", "--method", "np", "--option", "mu", "--out", "x.safetensors"], "no LoRA file at"),
        (["train", "--prompt", "a fox", "--out", "g", "--single", "fox"], "--single 'fox' is not NAME=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_status_1(capsys, argv, message):
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_merge_overwrites_no_file_unasked(loras, tmp_path, capsys):
    mine = tmp_path / "fox.safetensors"
    mine.write_bytes(before := loras["fox"].read_bytes())
    assert main(["merge", str(mine), str(loras["ink"]), "--out", str(mine)]) == 1
    assert "is there already; give another --out, or --overwrite" in capsys.readouterr().err
    assert mine.read_bytes() == before
    assert main(["merge", str(mine), str(loras["ink"]), "--out", str(mine), "--overwrite"]) == 0
    assert mine.read_bytes() != before


def test_files_of_one_name_are_merged_by_names_of_their_own(loras, tmp_path, capsys):
    other = tmp_path / "a=b" / "fox.safetensors"
    other.parent.mkdir()
    other.write_bytes(loras["ink"].read_bytes())
    files = [str(loras["fox"]), f"ink={other}:0.5"]
    assert main(["merge", *files, "--out", str(tmp_path / "one.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mole.experts"] == "fox, ink"
    assert by_name([str(other)]) == {"fox": str(other)}


def test_a_folder_in_the_place_of_a_lora_names_its_files(loras, capsys):
    folder = loras["fox"].parent
    for argv in (["inspect", str(folder)], ["compose", "a fox", "--expert", f"fox={folder}"]):
        assert main(argv) == 1
        assert f"no LoRA file at {folder}, a folder; give a file in it: " in "".join(capsys.readouterr())


def test_prompts_of_loras_that_are_not_merged_are_refused(loras, tmp_path, capsys):
    files = [str(loras["fox"]), str(loras["ink"])]
    ssr = ["merge", *files, "--method", "ssr", "--out", str(tmp_path / "x.safetensors"), "--base", "somewhere"]
    assert main([*ssr, "--own", "foxx=a fox"]) == 1
    assert "--own 'foxx': no such LoRA; known: ['fox', 'ink']" in capsys.readouterr().err
    assert main([*ssr, "--own", "fox=a fox"]) == 1
    assert "and ['ink'] have no trigger words: give --own NAME=PROMPT" in capsys.readouterr().err
    assert main([*ssr, "--option", "size=1"]) == 1
    assert "unknown options ['size'] of merge method 'ssr'; known: ['ridge']" in capsys.readouterr().err


def test_a_file_may_have_a_strength():
    assert parse_file("x.safetensors") == (Path("x.safetensors"), 1.0)
    assert parse_file("x.safetensors:-0.5") == (Path("x.safetensors"), -0.5)
    assert parse_file("C:/x.safetensors") == (Path("C:/x.safetensors"), 1.0)


def test_what_is_spelled_out_for_the_help_is_what_the_package_has():
    from mole_diffusers.gates import GATE_TYPES
    from mole_diffusers.merging.merge import METHODS
    from mole_diffusers.training.config import TERMS

    commands = parser(*NAMED).commands
    assert get_args(get_type_hints(merge_files)["method"]) == tuple(METHODS)
    said = {name: " ".join(option.help or "" for option in command.params) for name, command in commands.items()}
    assert [name for name in TERMS if f" {name}" not in said["train"]] == []
    assert [name for name, gate_type in GATE_TYPES.items() if gate_type.learns and name not in said["train"]] == []


def test_brackets_of_the_help_are_no_markup(capsys):
    whole = parser(*NAMED)
    for name, command in whole.commands.items():
        whole.main([name, "--help"], standalone_mode=False)
        shown = capsys.readouterr().out
        for option in command.params:
            assert all(word in shown for word in re.findall(r"\[[a-z]+\]", option.help or "")), option.name


def test_help_names_options_that_the_command_has_and_no_code():
    for name, command in parser(*NAMED).commands.items():
        flags = {flag for option in command.params for flag in option.opts}
        for option in command.params:
            named = set(re.findall(r"(?<!mole )--[a-z][a-z0-9-]*", option.help or ""))
            assert named <= flags, (name, option.name)
            assert not re.search(r"`\w+\.", option.help or ""), (name, option.name)


def test_a_flag_for_every_setting_of_a_training_run():
    """And of the type of the setting, or of one that it may be left out of."""
    from mole_diffusers.gates import GATE_TYPES
    from mole_diffusers.training.config import GateTraining, LoraTraining

    for command, configs, elsewhere in (
        ("train", (*GATE_TYPES.values(), GateTraining), {"terms": "term", "validation": "validate"}),
        ("train-lora", (LoraTraining,), {"prior": "prior_weight"}),
    ):
        flags = {option.name for option in parser(*NAMED).commands[command].params}
        wanted = {elsewhere.get(field.name, field.name) for config in configs for field in fields(config)}
        assert wanted <= flags, command


def test_compose_binds_words_and_places(loras, base, tmp_path, capsys):
    experts = [word for name in ("fox", "ink") for word in ("--expert", f"{name}={loras[name]}")]
    compose = ["compose", "a fox in ink", *experts, "--base", str(base), "--steps", "1", "--rows", "1"]
    pictures = {}
    for name, options in {
        "bound": ["--bind", "fox=fox@left", "--bind", "ink=everywhere"],
        "unbound": ["--unbound"],
    }.items():
        assert main([*compose, *options, "--out", str(tmp_path / f"{name}.png")]) == 0
        pictures[name] = (tmp_path / f"{name}.png").read_bytes()
    assert pictures["bound"] != pictures["unbound"]
    about = json.loads(Image.open(tmp_path / "unbound.png").text[infotext.SHEET])
    assert (about["unbound"], about["strengths"]) == (True, {"fox": 1.0, "ink": 1.0})
    assert main([*compose, "--bind", "cat=cat"]) == 1
    assert "unknown expert 'cat'; attached: ['fox', 'ink']" in capsys.readouterr().err
    assert main([*compose, "--bind", "fox=fox", "--unbound"]) == 1
    assert "exclude each other" in capsys.readouterr().err


def test_compose_draws_composers_of_the_evaluation(loras, base, tmp_path, capsys, monkeypatch):
    """ "sum" is the column of that name; the LoRAs have their strengths; what cannot be drawn is said before anything is."""
    sheets = []
    module = import_module("mole_cli.compose")
    save = module.PromptSheet.save
    monkeypatch.setattr(module.PromptSheet, "save", lambda page, *a, **k: sheets.append(page.columns) or save(page, *a, **k))
    drawn = ["--base", str(base), "--steps", "2", "--rows", "1", "--expert", f"fox={loras['fox']}"]
    compose = ["compose", "a fox in ink", *drawn, "--expert", f"ink={loras['ink']}:0.5"]
    assert main([*compose, "--out", str(tmp_path / "plain.png")]) == 0
    more = [word for name in ("mean", "np", "sum") for word in ("--method", name)]
    assert main([*compose, *more, "--out", str(tmp_path / "more.png")]) == 0
    plain, found = sheets
    assert list(found) == [*plain, "mean", "np"] == ["sum", "bound", "mean", "np"]
    assert found["sum"] == plain["sum"]
    assert main([*compose, "--alone", "--method", "base", "--out", str(tmp_path / "alone.png")]) == 0
    alone = sheets.pop()
    assert list(alone) == ["base", "alone fox", "alone ink", *plain]
    assert alone["sum"] == plain["sum"]
    assert main([*compose, "--method", "base", "--out", str(tmp_path / "base.png")]) == 0
    assert sheets.pop()["base"] == alone["base"]
    assert len({image.tobytes() for (image,) in map((found | alone).get, ("sum", "mean", "np", "base"))}) == 4
    halved = [*compose[:-1], f"ink={loras['ink']}:0.25"]
    assert main([*halved, "--method", "mean", "--out", str(tmp_path / "less.png")]) == 0
    assert sheets[-1]["mean"] != found["mean"]
    capsys.readouterr()
    for options, why in (
        (["best"], "unknown methods ['best']; known: ['base',"),
        (["k-lora", "--methods-from", str(RIVALS)], "'k-lora' does not draw 3 LoRAs"),
        (["gates"], "'gates' needs a folder of trained gates"),
    ):
        asked = [*compose, "--expert", f"hat={loras['hat']}", "--method", *options]
        assert main(asked) == 1
        assert why in capsys.readouterr().err


def test_shells_complete_commands_and_options(monkeypatch, capsys):
    monkeypatch.setenv("_MOLE_COMPLETE", "complete_bash")
    for words, found in (("mole dr", ["draw"]), ("mole draw --hir", ["--hires", "--hires-strength"])):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        with pytest.raises(SystemExit):
            main([])
        assert capsys.readouterr().out.split() == found
