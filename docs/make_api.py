"""docs/api.md from the docstrings of everything that `mole_diffusers` exports.

python docs/make_api.py
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import mole_diffusers as mole

HEAD = """# API reference

Everything that `import mole_diffusers as mole` gives, from the docstrings. Made by `python docs/make_api.py`; do not edit.
"""


def reference() -> str:
    """The whole document."""
    parts = [HEAD, *(entry(name, getattr(mole, name)) for name in sorted(mole.__all__, key=str.lower))]
    return "\n".join(parts)


def entry(name: str, thing: Any, *, level: int = 2) -> str:
    """A heading, the signature, the docstring, and a class's public methods."""
    lines = [
        f"{'#' * level} `{name}`",
        "",
        f"```text\n{name}{signature(thing)}\n```",
        "",
        prose(inspect.cleandoc(thing.__doc__ or "")),
        "",
    ]
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            if (method := callable_of(member)) is not None and not key.startswith("_") and method.__doc__:
                lines.append(entry(f"{name}.{key}", method, level=level + 1))
    return "\n".join(lines)


def callable_of(member: Any) -> Any:
    """The function behind a member of a class, None for what is none; a property is read by its getter."""
    if isinstance(member, property):
        return member.fget
    member = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
    return member if inspect.isfunction(member) else None


def signature(thing: Any) -> str:
    """As it stands in the code, in lines that fit; "" where it is a library's own, which changes with its versions."""
    if inspect.isclass(thing) and not getattr(thing.__init__, "__module__", "").startswith("mole_diffusers"):
        return ""
    try:
        found = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    found = re.sub(r"(: |-> )'([^']*)'", r"\1\2", re.sub(r" at 0x[0-9a-f]+", "", found)).replace("mole_diffusers.", "")
    return "\n    ".join(textwrap.wrap(found, 105, break_long_words=False, break_on_hyphens=False))


def prose(text: str) -> str:
    """A docstring as Markdown: sections as bold words with lists, code as it is."""
    text = text.replace("<", "&lt;")
    text = re.sub(r"^(Args|Returns|Raises|Attributes|Yields):$", r"**\1**\n", text, flags=re.MULTILINE)
    text = re.sub(r"^    (\*{0,2}\w[\w, .]*): ", r"- `\1`: ", text, flags=re.MULTILINE)
    return re.sub(r"^ {4,}(?=\S)", "  ", text, flags=re.MULTILINE)


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(reference())
