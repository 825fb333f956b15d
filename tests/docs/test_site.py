"""The documents as a gate location: it builds without a warning, and its reference holds everything public."""

import re
import runpy
import sys
from functools import cached_property
from pathlib import Path
from subprocess import run
from types import FunctionType

import pytest

import mole_diffusers as mole

ROOT = Path(__file__).parents[2]
LISTS = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
ITEMS = [item for path in LISTS["PAGES"] for item in LISTS["ITEM"].finditer(path.read_text())]
MEMBERS = {item[1]: LISTS["MEMBER"].findall(item[2]) for item in ITEMS}
REFERENCE = [item[1].removeprefix("mole_diffusers.") for item in ITEMS]
INTERNAL = "mole_diffusers.gates.types."  # classes that are described as options alone


@pytest.mark.parametrize("path", LISTS["PAGES"], ids=lambda path: path.name)
def test_lists_say_what_docstrings_say(path):
    assert path.read_text() == LISTS["page"](path.read_text()), "run: python docs/make_reference.py"
    assert ": \n" not in path.read_text()


def test_the_reference_describes_everything_public_once():
    assert sorted(name for name in REFERENCE if "." not in name) == sorted(mole.__all__)
    assert len(set(REFERENCE)) == len(REFERENCE)


@pytest.mark.parametrize("name", [name for name in MEMBERS if not name.startswith(INTERNAL)])
def test_the_reference_tells_all_that_a_class_can_do(name):
    thing = LISTS["named"](name)
    told = [member for member, value in vars(thing).items() if member[0] != "_" and public(value)]
    assert sorted(MEMBERS[name]) == sorted(told if isinstance(thing, type) else [])


def public(value):
    """Whether a class's attribute is a method or a property with a docstring."""
    return isinstance(value, FunctionType | property | classmethod | staticmethod | cached_property) and value.__doc__


def test_the_location_has_the_docstrings_of_what_is_listed():
    items = (
        "- [`mole_diffusers.attach`](x.py): Put.",
        "- [`mole_diffusers.Trace`](x.py): It.",
        "  - `mean`: a",
        "  - `locations`: b",
    )
    text = "".join(f"{item}\n" for item in items)
    assert re.findall(r"^(?::::|    ) ?(.+)$", LISTS["with_docstrings"](text), re.M) == [
        "mole_diffusers.attach",
        "options: {members: false}",
        "mole_diffusers.Trace",
        "options: {members: ['mean', 'locations']}",
    ]


@pytest.mark.thorough
def test_the_location_builds_without_a_warning(tmp_path):
    built = run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "reference" / "mixture" / "index.html").read_text()
    assert mole.attach.__doc__.split(",")[0] in page
    assert (ROOT / "docs" / "world.md").read_text().count("](../demos/") > 0
    assert 'href="../demos/' not in (tmp_path / "world" / "index.html").read_text()
    assert '<a class="other" href="grid.png"><img' in (tmp_path / "index.html").read_text()
    assert '<a class="wide" href="../tutorial_sum.png"><img' in (tmp_path / "tutorial" / "index.html").read_text()
