"""A page from its text and its tables, so that no number of a table is copied by hand."""

import re
from collections.abc import Mapping


def fill(text: str, parts: Mapping[str, str]) -> str:
    """`text` with `{{NAME}}` replaced by that part, and `{{NAME: ROW, COLUMN}}` by the number in that cell of it.

    A number is without its interval; with a sign before the row, `{{NAME: +ROW, COLUMN}}`, it is signed and has it.
    Raises KeyError for a part, row or column that does not exist.
    """

    def number(found: re.Match[str]) -> str:
        name, sign, row, column = found.groups()
        cell = _cell(parts[name], " ".join(row.split()), " ".join(column.split()))
        if not sign:
            return cell.partition(" ")[0]
        return cell if cell.startswith("-") else f"+{cell}"

    text = re.sub(r"\{\{(\w+):\s(\+?)([^{}]+),\s([^{},]+)\}\}", number, text)
    return re.sub(r"\{\{([^{}]+)\}\}", lambda found: parts[found[1]], text)


def _cell(table: str, row: str, column: str) -> str:
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return dict(zip(head, {line[0]: line for line in body}[row], strict=True))[column]
