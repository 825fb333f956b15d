"""Tables of the documents that name tests: each of them is there, and the table of hosts knows every host."""

import ast
import re
from pathlib import Path

import hosts
import pytest

ROOT = Path(__file__).parents[2]
TABLES = [path for path in (ROOT / "docs" / "hosts.md", ROOT / "docs" / "files.md") if path.exists()]
NAMED = re.compile(r"\b(tests/[\w/]*test_\w+\.py)::(test_\w+)")


def defined(file):
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.name)
def test_every_test_that_a_table_names_exists(table):
    named = set(NAMED.findall(table.read_text()))
    assert len(named) > 10
    assert [f"{file}::{name}" for file, name in sorted(named) if name not in defined(file)] == []


def test_the_table_of_hosts_knows_every_host():
    text = (ROOT / "docs" / "hosts.md").read_text()
    rows = re.findall(r"::test_attach_train_save_reload_detach\[([\w-]+)\]", text)
    assert rows == list(hosts.HOSTS)
