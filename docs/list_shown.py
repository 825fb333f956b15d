"""Print which test shows what the tables of the documents say, from the marks `shows` of the tests.

    python docs/list_shown.py

A test is marked with the first cell of a row, or the heading above a table, of one of the `PAGES`:
`@pytest.mark.shows("hotswap")`. Run one with `pytest -m "" -n0 FILE -k NAME`.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
TESTS = [ROOT / "tests", *sorted(ROOT.glob("demos/*/tests"))]
PAGES = ("hosts", "files", "errors")
BY_HEADING = {
    "Pipelines",
    "Words and places",
    "LoRA files of each kind",
    "Files",
    "Training",
    "Threads and interruptions",
}


def marks() -> dict[str, list[str]]:
    """What is shown -> "file::test" of each test that shows it."""
    found = defaultdict(list)
    for path in sorted(path for folder in TESTS for path in folder.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.shows":
                    for shown in ast.literal_eval(ast.Tuple(mark.args, ast.Load())):
                        found[shown].append(f"{path.relative_to(ROOT)}::{node.name}")
    return dict(found)


def rows(page: str) -> dict[str, list[str]]:
    """Heading -> what has to be shown below it: the first cells of its tables, or itself."""
    found: dict[str, list[str]] = {}
    for heading, text in re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", (HERE / f"{page}.md").read_text(), re.M | re.DOTALL):
        cells = re.findall(r"^\| (.+?) \|", "\n".join(re.findall(r"(?<=\|---\|\n)(?:\|.+\n)+", text)), re.M)
        if heading in BY_HEADING:
            found[heading] = [heading]
        elif cells:
            found[heading] = cells
    return found


def listing() -> str:
    """The tests by page, heading and row. Raises ValueError for a mark that no table has, and for a row without a mark."""
    tests, text = marks(), ""
    pages = {page: rows(page) for page in PAGES}
    wanted = [row for page in pages.values() for below in page.values() for row in below]
    if wrong := [*sorted(set(tests) - set(wanted)), *(row for row in wanted if row not in tests)]:
        raise ValueError(f"no row or no test of: {wrong}")
    for page, headings in pages.items():
        for heading, below in headings.items():
            text += f"\n{page}.md, {heading}\n"
            for row in below:
                text += "\n".join([f"  {row}", *(f"    {test}" for test in tests[row]), ""])
    return text


if __name__ == "__main__":
    print(listing())
