"""A page from its text and its tables, so that no number of a table is copied by hand."""

import re
from collections.abc import Mapping


def fill(text: str, parts: Mapping[str, str]) -> str:
    """`text` with `{{NAME}}` replaced by that part, and `{{NAME: ROW, COLUMN}}` by the number in that cell of it.

    A number is without its interval; with a sign before the row, `{{NAME: +ROW, COLUMN}}`, it is signed and has it.
    Raises KeyError for a part, row or column that does not exist.
    """
    text = re.sub(r"\{\{(\w+):\s(\+?)([^{}]+),\s([^{},]+)\}\}", lambda found: _number(parts, *found.groups()), text)
    return re.sub(r"\{\{([^{}]+)\}\}", lambda found: parts[found[1]], text)


def _number(parts: Mapping[str, str], name: str, sign: str, row: str, column: str) -> str:
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in parts[name].splitlines())
    cells = {line[0]: line for line in body}[" ".join(row.split())]
    cell = dict(zip(head, cells, strict=True))[" ".join(column.split())]
    if not sign:
        return cell.partition(" ")[0]
    return cell if cell.startswith("-") else f"+{cell}"
