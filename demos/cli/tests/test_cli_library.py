"""`mole index`, `mole retrieve` and `mole compose-library`, on the embedded world's own LoRAs."""

import json
import shutil
from importlib import import_module

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from mole_cli.mole import main
from mole_world.world import concept_files

DRAW = ["--rows", "2", "--steps", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A library of five LoRAs and a page that is none."""
    folder = tmp_path_factory.mktemp("library")
    for name in ("fox", "cheese wedge", "birthday cake", "relief", "duotone"):
        shutil.copy(concept_files()[name], folder)
    (folder / "page.safetensors").write_text("<html>")
    assert main(["index", str(folder)]) == 0
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_index_says_what_is_there_and_what_is_not(folder, capsys):
    assert main(["index", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["loras"] == ["birthday_cake", "cheese_wedge", "duotone", "fox", "relief"]
    assert "is an HTML page" in facts["skipped"]["page.safetensors"]
    assert main(["index", str(folder)]) == 0
    assert "5 LoRAs\nleft out page.safetensors: " in capsys.readouterr().out


def test_retrieve_says_what_and_why(folder, capsys):
    search = ["retrieve", "relief drawing of a birthday cake and a fox", "--library", str(folder), "--threshold", "0.9"]
    assert main([*search, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["name"], each["trigger"]) for each in found] == [
        ("relief", "relief"),
        ("birthday_cake", "birthday cake"),
        ("fox", "fox"),
    ]
    assert found[1]["file"] == "birthday_cake.safetensors"
    assert main(search) == 0
    assert "fox: the prompt says its trigger 'fox'\n" in capsys.readouterr().out
    assert main(["retrieve", "noto drawing of cheese wedges", "--library", str(folder)]) == 0
    assert capsys.readouterr().out == "cheese_wedge: the prompt says its trigger 'cheese wedge'\n"
    assert main(["retrieve", "noto drawing of a wedge", "--library", str(folder), "--threshold", "0.6"]) == 0
    assert "cheese_wedge: 'wedge' is like its samples (0." in capsys.readouterr().out
    assert main(["retrieve", "a bear", "--library", str(folder)]) == 0
    assert "the prompt asks for none of the 5 LoRAs" in capsys.readouterr().out
    assert main(["retrieve", "a birthday (cake:1.3)", "--library", str(folder), "--threshold", "0.9"]) == 0
    assert "birthday_cake: the prompt says its trigger 'birthday cake'" in capsys.readouterr().out


@pytest.mark.thorough
def test_compose_draws_what_was_found_as_if_it_had_been_named(folder, tmp_path, capsys):
    prompt, out = "duotone drawing of a fox", tmp_path / "new" / "found.png"
    found = ["--library", str(folder), "--threshold", "0.9", "--out", str(out), "--overwrite"]
    assert main(["compose-library", prompt, *found, *DRAW, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in facts["found"]] == ["duotone", "fox"]
    assert (facts["weights"], facts["mode"], facts["gates"]) == ({"duotone": 1.0, "fox": 1.0}, "sum", "sum")
    experts = [f"--expert={n}={concept_files()[n]}" for n in ("duotone", "fox")]
    assert main(["compose", prompt, *experts, *DRAW, "--gates", "sum", "--out", str(tmp_path / "named.png")]) == 0
    ours, named = pixels(out), pixels(tmp_path / "named.png")
    first, second = slice(-2 * 134, -134), slice(-134, None)  # cells of 128 and a margin
    assert np.array_equal(ours[30:, second], named[30:, first])  # under "bound", which stands before the true drawing
    assert not np.array_equal(ours[30:, first], ours[30:, second])
    capsys.readouterr()
    assert main(["compose-library", prompt, *found, *DRAW, "--mode", "mixture", "--k", "2"]) == 0
    said = capsys.readouterr().out
    assert "fox: the prompt says its trigger 'fox'\ndrawn with duotone x 0.5, fox x 0.5, mixture: " in said
    assert main(["compose-library", "a bear", "--library", str(folder), "--threshold", "0.99", *DRAW, *found[4:]]) == 0
    assert "drawn with the base alone" in capsys.readouterr().out
    alone = pixels(out)
    assert np.array_equal(alone[30:, first], alone[30:, second])


def test_several_subjects_are_drawn_in_tiles_where_there_is_room(folder, tmp_path):
    prompt = "noto drawing of a (cheese wedge:1.2) and a fox"
    out, alone = tmp_path / "found.png", tmp_path / "drawn.png"
    how = ["--steps", "2", "--seed", "3", "--out"]
    found = ["--library", str(folder), "--threshold", "0.9", "--rows", "1"]
    assert main(["compose-library", prompt, *found, *how, str(out)]) == 0
    assert main(["draw", f"{prompt} <lora:cheese wedge> <lora:fox>", "--gates", "sum", *how, str(alone)]) == 0
    drawn = np.asarray(Image.open(alone).convert("RGB").resize((256, 128), Image.Resampling.LANCZOS))
    assert np.array_equal(pixels(out)[32:-6, -262:-6], drawn)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["index", "nowhere"], "dir 'nowhere' does not exist"),
        (["retrieve", "a fox", "--library", "."], ". has no index; make one with: mole index ."),
        (["compose-library", "a <lora:fox:1>", "--library", "."], "the library chooses the LoRAs"),
        (["compose-library", "a fox", "--library", ".", "--mode", "both"], "'both' is not one of 'selection', 'mixture'"),
        (["retrieve", "a fox"], "Missing option '--library'"),
        (["compose-library", "a fox", "--library", ".", "--k", "0"], "Invalid value for '--k'"),
    ],
)
def test_bad_input_is_one_line_and_status_1(argv, message, capsys):
    assert main(argv) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_loras_that_cannot_be_fused_are_said_before_anything_is_drawn(loras, tmp_path, monkeypatch, capsys):
    base, library = str(tmp_path / "base"), tmp_path / "library"
    tiny_pipeline().save_pretrained(base)
    library.mkdir()
    for name in ("fox", "ink"):  # of rank 4 and 2
        shutil.copy(loras[name], library)
    assert main(["index", str(library), "--base", base]) == 0
    monkeypatch.setattr(import_module("mole_cli.compose").PromptSheet, "draw", lambda *_: pytest.fail("drawn"))
    command = ["compose-library", "a fox in ink", "--library", str(library), "--base", base, "--mode", "fusion"]
    assert main([*command, "--out", str(tmp_path / "x.png")]) == 1
    assert "cannot be fused: the ranks of layer " in capsys.readouterr().err


def test_a_library_of_another_base_is_refused(folder, tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path)
    assert main(["retrieve", "a fox", "--library", str(folder), "--base", str(tmp_path)]) == 1
    assert "was made with another encoder" in capsys.readouterr().err.splitlines()[-1]
    assert main(["retrieve", "a fox", "--library", str(folder), "--encoder", "none"]) == 1
    assert "sentence-transformers" in capsys.readouterr().err
