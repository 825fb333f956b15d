"""An option that would be ignored beside the others is refused in one line, or a note says so."""

import json
import shutil
from importlib import import_module

import pytest

from mole_cli.mole import main
from mole_world import default_folder
from mole_world.world import concept_files

FOX = concept_files()["fox"]
CASES = [
    (["draw", "a fox", "--explain", "--overwrite"], "--explain draws nothing: leave out --out and --overwrite"),
    (["draw", "a fox", "--styles", __file__], "--styles is the file that styles are read from: give --style NAME"),
    (["draw", "a fox", "--base-config", "sd15"], "emoji has a config of its own: leave out --base-config"),
    (["draw", "a fox", "--gates", "sum"], "--gates would do nothing: the prompt has no <lora:NAME:1> tag"),
    (["draw", "a fox", "--gates", "sum", "--binding", "none"], "--gates and --binding would do nothing"),
    (["draw", "a <lora:owl:1>", "--expert", f"mine={FOX}"], "no tag of the prompt names 'mine', which would do nothing"),
    (["grid", "a fox", "--seed", "5"], "the axis 'seed=0,1,2' varies what --seed gives: leave it out"),
    (["grid", "a fox", "--x", "hires_strength=0,1", "--hires-strength", "0.3"], "varies what --hires-strength gives"),
    (["inspect", "a.safetensors", "--device", "cpu"], "open a base to match the layers with: give --base"),
    (["index", ".", "--encoder", "mini", "--base", "emoji"], "--encoder reads the texts, and no base is opened"),
    (["evaluate", "--judged", "--method", "sum", "--seeds", "8"], "draws nothing: leave out --method, --seeds"),
    (["evaluate", "--base", "mine", "--split", "validation"], "--split chooses cases of the embedded world"),
    (["evaluate", "--search", "--gates", "."], "--search draws methods of its own: leave out --gates"),
    (["evaluate", "--limit", "1", "--method", "sum", "--gates", "."], "--gates are for the methods gates, gates uniform,"),
    (["train", "--schedule", "constant", "--warmup", "9", "--write-config", "x"], "'constant' has no warmup"),
    (["train-lora", "--prior-data", "dogs", "--prior-steps", "9"], "none are drawn: leave out --prior-steps"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), CASES, ids=[" ".join(argv) for argv, _ in CASES])
def test_what_would_be_ignored_is_refused(argv, message, capsys):
    assert main(argv) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_lora_file_that_a_tag_names_in_another_spelling_is_used(tmp_path, capsys):
    shutil.copy(FOX, tmp_path / "x.safetensors")
    named = ["--expert", f"My fox={tmp_path / 'x.safetensors'}"]
    assert main(["draw", "a fox <lora:my_fox:0.5>", *named, "--explain", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["experts"]) == ["My fox"]


def test_gates_of_the_world_are_a_default_that_no_method_has_to_read(tmp_path, capsys):
    small = ["--limit", "1", "--seeds", "1", "--steps", "1", "--out", str(tmp_path), "--device", "cpu"]
    assert main(["evaluate", "--method", "base", *small]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--method", "base", *small, "--gates", str(default_folder() / "gates")]) == 1
    assert "none of which is drawn here" in capsys.readouterr().err


def test_what_a_file_of_settings_does_not_hold_is_said(tmp_path, capsys):
    file = tmp_path / "run.json"
    lost = ["--out", "x", "--device", "cpu", "--push-to-hub", "me/gates"]
    assert main(["train", "--prompt", "a fox", *lost, "--write-config", str(file)]) == 0
    assert "note: the file does not hold --out, --device, --push-to-hub: give that again" in capsys.readouterr().err
    assert json.loads(file.read_text())["lesson"] == {"composed": ["a fox"]}
    assert main(["train", "--write-config", str(tmp_path / "more.json")]) == 0
    assert not capsys.readouterr().err


def test_a_prompt_and_a_size_that_no_term_learns_from_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(import_module("mole_cli.train"), "trained_pipeline", lambda *_: [][0])  # far enough
    words = ["--prompt", "a fox", "--single", "fox=a fox", "--width", "64", "--out", str(tmp_path)]
    for more, unread in (
        (["--term", "single"], ["--prompt (--term composed", "--width (--term composed"]),
        (["--term", "single", "--validate", "1"], []),  # which draws them
        (["--term", "composed"], []),
        (["--term", "collage", "--part", "a fox"], []),
    ):
        with pytest.raises(IndexError):
            main(["train", *words, *more])
        said = capsys.readouterr().err
        assert [text for text in ("--prompt (--term composed", "--width (--term composed") if text in said] == unread, more


@pytest.mark.parametrize(("guidance", "is_read"), [("1", False), ("1.5", True)])
def test_a_negative_prompt_that_nothing_reads_is_said(guidance, is_read, capsys):
    assert main(["draw", "a fox <lora:fox:1>", "--negative", "blur", "--guidance", guidance, "--explain"]) == 0
    said = "note: negative prompts are read from a guidance above 1 on, and it is 1\n" in capsys.readouterr().err
    assert said != is_read
