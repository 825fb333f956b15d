"""The pages of methods and merges name every one that there is, in the table of its kind."""

import re
from pathlib import Path
from typing import get_args

import pytest

import rivals
from mole_diffusers.gates import GATE_TYPES, GateConfig
from mole_diffusers.merging.merge import METHODS, by_activations
from mole_diffusers.retrieval import Mode

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "methods.md").read_text() + (DOCS / "merge.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))


def rows(section):
    """First cell of every row of a section's table."""
    return re.findall(r"^\| `([\w-]+)` \|", SECTIONS[section], re.MULTILINE)


def test_every_family_and_every_merge_has_its_row():
    assert sorted(rows("Gates")) == sorted(GATE_TYPES)
    assert sorted(rows("Merges")) == sorted(METHODS)
    assert rows("Merges")[-4:] == [method for method in METHODS if by_activations(method)]


@pytest.mark.parametrize("name", sorted(rivals.METHODS))
def test_every_rival_while_sampling_is_there(name):
    assert f"**{name}**" in SECTIONS["While sampling"].lower()


def test_the_librarys_modes_are_there():
    assert all(f"`{mode}`" in SECTIONS["Libraries"] for mode in get_args(Mode))


@pytest.mark.parametrize("gate_type", [name for name, gate_type in GATE_TYPES.items() if gate_type.learns])
def test_what_is_said_of_a_family_can_be_set(gate_type):
    """Every `option=value` of a family's paragraph is one that its config takes."""
    said = re.search(rf"- \*\*`{gate_type}`\*\*(.*?)(?=\n- \*\*|\Z)", SECTIONS["Gates"], re.DOTALL)
    for option, value in re.findall(r"`(\w+)=\"?(\w+)\"?`", said[1] if said else ""):
        assert GateConfig(gate_type, **{option: int(value) if value.isdigit() and option == "partition" else value})
