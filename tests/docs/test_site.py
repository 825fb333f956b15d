"""The documents as a site: it builds without a warning, and its reference holds everything public."""

import re
import sys
from pathlib import Path
from pkgutil import resolve_name
from subprocess import run

import pytest

import mole_diffusers as mole

ROOT = Path(__file__).parents[2]
REFERENCE = re.findall(
    r"^::: mole_diffusers\.([\w.]+)$", "\n".join(p.read_text() for p in (ROOT / "docs" / "reference").glob("*.md")), re.M
)


@pytest.mark.parametrize("name", REFERENCE)
def test_what_the_reference_describes_has_a_docstring(name):
    module, _, thing = f"mole_diffusers.{name}".rpartition(".")
    assert resolve_name(f"{module}:{thing}").__doc__


def test_the_reference_describes_everything_public_once():
    assert sorted(name for name in REFERENCE if "." not in name) == sorted(mole.__all__)


def test_the_reference_tells_all_that_a_mixture_can_do():
    (told,) = re.findall(r"members: \[(.+?)\]", (ROOT / "docs" / "reference" / "mixture.md").read_text(), re.DOTALL)
    names = re.findall(r"\w+", told)
    assert sorted(names) == [name for name in dir(mole.Mixture) if not name.startswith("_")]
    assert [name for name in names if not getattr(mole.Mixture, name).__doc__] == []


@pytest.mark.thorough
def test_the_site_builds_without_a_warning(tmp_path):
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
