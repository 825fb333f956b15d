"""Named options: checked against type annotations, and described by docstrings."""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["check_kinds", "check_options", "described"]

ENTRY = re.compile(r"^ {4}([\w, ]+?)(?: \((\S+)\))?: (.+(?:\n {8}.+)*)", re.MULTILINE)  # in a docstring's Args
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}


def described(subject: Any) -> dict[str, tuple[str | None, str]]:
    """Name -> (metavar, help) from the Args or Attributes of a docstring; those of a class's bases are its own, too."""
    docs = [each.__doc__ for each in reversed(subject.__mro__[:-1])] if isinstance(subject, type) else [subject.__doc__]
    entries = [entry for doc in docs for entry in ENTRY.findall(inspect.cleandoc(doc or ""))]
    return {n: (metavar or None, " ".join(text.split())) for names, metavar, text in entries for n in names.split(", ")}


def check_options(values: Mapping[str, Any], kinds: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for an unknown name, or a value of the wrong kind."""
    check_names(values, kinds, what)
    check_kinds(values, kinds, what)


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for a value that is not of its name's kind. A kind is a type, as in an annotation."""
    for name, value in values.items():
        if not _is_of(value, kinds[name]):
            raise ValueError(f"{name} of {what} must be {_in_words(kinds[name])}, got {reprlib.repr(value):.100}")


def check_names(names: Collection[str], known: Collection[str], what: str) -> None:
    """Raise ValueError for an unknown name."""
    if unknown := set(names) - set(known):
        raise ValueError(f"unknown options {sorted(unknown, key=str)} of {what}; known: {list(known)}")


def _is_of(value: Any, kind: Any) -> bool:
    form, parts = get_origin(kind), get_args(kind)
    if form in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if form is Literal:
        return value in parts
    if form is Mapping:
        return isinstance(value, Mapping) and all(_is_of(each, parts[1]) for each in value.values())
    if form:  # list, tuple, Sequence
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_of(each, parts[0]) for each in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def _in_words(kind: Any) -> str:
    form, parts = get_origin(kind), get_args(kind)
    if form in (Union, UnionType):
        return " or ".join(_in_words(part) for part in parts if part is not NoneType)
    if form is Literal:
        return f"one of {list(parts)}"
    if form is Mapping:
        return f"names, each with {_in_words(parts[1])}"
    return f"a list of {_in_words(parts[0]).removeprefix('a ')}s" if form else TYPE_NAMES.get(kind, "a value")
