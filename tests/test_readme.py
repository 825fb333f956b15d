"""The README's code and the demos run, and CI runs the README's own test command."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["image"], Image.Image)


def test_ci_runs_the_readmes_command():
    see, test = (block.strip() for block in blocks("bash")[:2])
    assert see.endswith(".venv/bin/mole compose")
    assert (ROOT / ".ci" / "run").read_text().strip().endswith(test)


def test_the_pictures_it_shows_exist():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert shown
    for path in shown:
        Image.open(ROOT / path).verify()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("01_compose.py", ["x.png"]), ("02_train_gates.py", ["gates", "2"]), ("03_watch_the_gates.py", [])],
)
def test_demos_run(script, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "demos" / script), run_name="__main__")
    assert capsys.readouterr().out
    for path in arguments[:1]:
        assert (tmp_path / path).exists()
