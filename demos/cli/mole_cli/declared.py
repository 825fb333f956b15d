"""The dataclasses of this package as their source declares them, without importing it: that would import torch, which takes
longer than any help.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

# What annotations may consist of, besides built-in types.
KINDS: dict[str, Any] = {
    "Annotated": Annotated, "Any": Any, "Literal": Literal, "Mapping": Mapping, "Sequence": Sequence
}  # fmt: skip


def declared(path: str) -> dict[str, type]:
    """Name -> dataclass, for those of a file or folder such as "mole_diffusers/gates/families".

    It has the fields and the docstring of the one in the file, what is assigned in its body, and what is given to the class
    like a base, such as a name. A value that is no literal is None here.
    """
    package, _, within = path.partition("/")
    there = Path(str(find_spec(package).origin)).parent / within  # type: ignore[union-attr]
    files = sorted(there.glob("*.py")) if there.is_dir() else [there]
    classes = (node for file in files for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef))
    return {node.name: _twin(node) for node in classes if any("dataclass" in ast.unparse(d) for d in node.decorator_list)}


def _twin(node: ast.ClassDef) -> type:
    own: dict[str, Any] = {"__doc__": ast.get_docstring(node)}
    own |= {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            own |= dict.fromkeys(map(ast.unparse, statement.targets), _literal(statement.value))
    return make_dataclass(node.name, _fields(node), namespace=own)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Any, Any]]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign):
            kind = eval(ast.unparse(statement.annotation), {**KINDS})
            yield ast.unparse(statement.target), kind, _literal(statement.value)


def _literal(node: ast.expr | None) -> Any:
    with suppress(ValueError, TypeError):
        return None if node is None else ast.literal_eval(node)
    return None
