"""Styles and presets: words around a prompt, and settings of another recipe."""

from pathlib import Path

import pytest

from mole_app.studio import infotext
from mole_app.studio.recipe import Recipe
from mole_app.studio.styles import SETTINGS, Style, preset, read_styles, styled
from mole_cli.mole import main

FILE = """\
name,prompt,negative_prompt
Ink,"ink drawing of {prompt}, on paper","photo, {prompt}"
plain,flat colours,
"""
STYLES = [Style("Ink", "ink drawing of {prompt}, on paper", "photo, {prompt}"), Style("plain", "flat colours", "")]


def test_styles_are_put_around_a_prompt_and_kept_in_the_file_of_a1111(tmp_path):
    lines = [FILE, 'odd,"a ""quoted"", word\nin two lines",é\n']
    (tmp_path / "styles.csv").write_text("".join(lines), encoding="utf-8")
    known = read_styles(tmp_path / "styles.csv")
    assert list(known.values())[:2] == STYLES
    assert known["odd"].prompt == 'a "quoted", word\nin two lines'
    recipe = styled(Recipe("a fox <lora:fox:1>", negative="blur"), ["ink", "PLAIN"], known)
    assert recipe.prompt == "ink drawing of a fox <lora:fox:1>, on paper, flat colours"
    assert recipe.negative == "photo, blur"
    with pytest.raises(ValueError, match="no style 'inkk'; known: Ink, plain, odd"):
        styled(recipe, ["inkk"], known)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("styles.csv", b"a,b\n1,2", "styles.csv is no file of styles: a .csv with the columns name, prompt"),
        ("styles.csv", b"\xff\xfe", "styles.csv is no file of styles: 'utf-8"),
        ("styles.csv", b"x" * ((1 << 20) + 1), "styles.csv is too large"),
        ("styles.json", b"{}", "styles.json is no file of styles"),
        ("styles.json", b"[", "styles.json is not JSON"),
    ],
)
def test_what_is_no_file_of_styles_is_refused(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_styles(tmp_path / name)


def test_styles_of_fooocus_are_read(tmp_path):
    (tmp_path / "styles.json").write_text(
        '[{"name": "Ink", "prompt": "ink {prompt}", "negative_prompt": "photo"}, {"x": 1}]'
    )
    assert read_styles(tmp_path / "styles.json") == {"Ink": Style("Ink", "ink {prompt}", "photo")}


def test_the_commands_take_styles_and_the_settings_of_another_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("styles.csv").write_text(FILE)
    Recipe("a koala", steps=1, width=64, height=32, sampler="Euler", guidance=2.0).save("like.json")
    draw = ["draw", "a tiger", "--preset", "like.json", "--device", "cpu"]
    assert main([*draw, "--style", "ink", "--guidance", "1.5", "--out", "a.png"]) == 0
    drawn = infotext.read("a.png")
    assert (drawn.prompt, drawn.negative) == ("ink drawing of a tiger, on paper", "photo")
    assert (drawn.steps, drawn.width, drawn.height, drawn.sampler, drawn.guidance) == (1, 64, 32, "Euler", 1.5)
    again = preset("a.png")
    assert again.keys() == set(SETTINGS)
    assert again["sampler"] == "Euler"
