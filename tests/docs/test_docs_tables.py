"""The tables of hosts, files and errors say what tests show."""

import runpy
from pathlib import Path

import hosts

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_hosts_names_every_host():
    table = (
        (DOCS / "hosts.md")
        .read_text()
        .partition("| model | tested with a drop-in | tested without |\n|---|---|---|\n")[2]
        .partition("\n\n")[0]
    )
    cells = [cell for row in table.splitlines() for cell in row.strip("| ").split("|")[1:] if cell.strip()]
    assert sum(len(cell.split(",")) for cell in cells) == len(hosts.HOSTS)


def test_pages_for_users_name_no_tests_of_single_functions():
    assert not [page.name for page in DOCS.glob("*.md") if "::test_" in page.read_text()]


def test_every_row_has_a_test_that_shows_it():
    listed = runpy.run_path(str(DOCS / "list_shown.py"))["listing"]()
    assert "  hotswap\n    tests/patching/host/" in listed
