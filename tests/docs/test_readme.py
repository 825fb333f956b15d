"""The README's code and the demos run, and CI runs the README's own test command."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["image"], Image.Image)


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


@pytest.mark.thorough
def test_the_time_to_the_first_picture_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["first_picture.py", "--runs", "1"])
    runpy.run_path(str(ROOT / "demos" / "app" / "first_picture.py"), run_name="__main__")
    page, picture = (float(line.split()[-4]) for line in capsys.readouterr().out.splitlines())
    assert 0 < page < picture


ROWS = {  # of the README's table, in the words of docs/results.md
    "each LoRA alone (mean)": "alone",
    "plain sum": "sum",
    "bound to words and places, training-free (the default)": "bound",
    "strengths by grid search": "grid search",
    "RegMean, training-free": "regmean",
    "`paper` gates, one softmax per block (MoLE)": "paper gates",
    "`flow` gates, by all three terms, not bound": "flow gates, mixed",
    "one LoRA trained on all the concepts": "joint LoRA",
}


def test_the_measured_table_is_that_of_the_results():
    results = (ROOT / "docs" / "results.md").read_text().partition("beside trained gates and ceilings")[2]
    measured = {row[0]: row[1:] for row in cells(results.partition("less that of the sum")[0])}
    shown = {row[0]: row[1:] for row in cells(README.partition("on the same compositions:")[2])}
    bound = (ROOT / "docs" / "bind.md").read_text().partition("## What it is worth")[2]
    measured |= {row[0]: row[1:4] for row in cells(bound) if row[0] == "bound"}
    assert set(shown) == {"arm", *ROWS}
    for name, arm in ROWS.items():
        found = [value.replace(" [0.00, 0.00]", "") for value in measured[arm]]
        assert [value.replace("**", "") for value in shown[name]] == found, name


def cells(text):
    """The rows of the first table in a text."""
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE).group()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [row for row in rows if not set(row[0]) <= set("- ")]
