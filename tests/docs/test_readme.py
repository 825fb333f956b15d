"""The README's code and the demos run, and CI runs the README's own test command."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from PIL import Image
from tiers import thorough

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, monkeypatch, tmp_path):
    """In four steps where it asks for more."""
    monkeypatch.chdir(tmp_path)
    set_timesteps = DDIMScheduler.set_timesteps
    monkeypatch.setattr(
        DDIMScheduler, "set_timesteps", lambda self, n, *args, **how: set_timesteps(self, min(n, 4), *args, **how)
    )
    names: dict = {}
    exec(code, names)
    assert isinstance(names["image"], Image.Image)
    assert list(tmp_path.glob("*.png"))


def test_the_pictures_it_shows_exist():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert shown
    for path in shown:
        Image.open(ROOT / path).verify()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("03_watch_the_gates.py", []),
        *thorough(("01_compose.py", ["x.png"]), ("02_train_gates.py", ["gates", "2"])),
    ],
)
def test_demos_run(script, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "demos" / script), run_name="__main__")
    assert capsys.readouterr().out
    for path in arguments[:1]:
        assert (tmp_path / path).exists()


@pytest.mark.thorough
def test_the_time_to_the_first_picture_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["first_picture.py", "--runs", "1"])
    runpy.run_path(str(ROOT / "demos" / "app" / "first_picture.py"), run_name="__main__")
    page, picture = (float(line.split()[-4]) for line in capsys.readouterr().out.splitlines())
    assert 0 < page < picture
