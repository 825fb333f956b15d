"""The lists of docs/reference/: what is public, with the first paragraph of its docstring. The site has the rest there.

    python docs/make_reference.py

A page names the things and, one level deeper, those of their members that the site describes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

HERE = Path(__file__).parent
PAGES = sorted((HERE / "reference").glob("*.md"))
ITEM = re.compile(r"^- \[`(mole_\w+\.[\w.]+)`\]\(.*\n((?:  - .*\n)*)", re.MULTILINE)
MEMBER = re.compile(r"^  - `(\w+)`", re.MULTILINE)


def named(name: str) -> Any:
    """The thing of this name, which ends after its module."""
    return resolve_name(":".join(name.rsplit(".", 1)))


def about(thing: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def page(text: str) -> str:
    """A page with its lists made anew."""

    def made(found: re.Match[str]) -> str:
        thing = named(found[1])
        file = Path(inspect.getfile(thing)).relative_to(HERE.parent)
        members = (f"  - `{member}`: {about(getattr(thing, member))}" for member in MEMBER.findall(found[2]))
        return "\n".join([f"- [`{found[1]}`](../../{file}): {about(thing)}", *members, ""])

    return ITEM.sub(made, text)


def with_docstrings(text: str) -> str:
    """A page whose lists are what mkdocstrings replaces by the whole docstrings."""

    def asked(found: re.Match[str]) -> str:
        members = MEMBER.findall(found[2])
        return f"\n::: {found[1]}\n    options: {{members: {members or 'false'}}}\n"

    return ITEM.sub(asked, text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
