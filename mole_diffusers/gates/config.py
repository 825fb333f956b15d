"""The gates of a mixture: a family and its options, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mole_diffusers.gates import families  # noqa: F401, which registers them
from mole_diffusers.gates.contract import FAMILIES, Family

RECOMMENDED = next(name for name, family in FAMILIES.items() if family.recommended)


@dataclass(frozen=True, init=False)
class GateConfig:
    """The gates of a mixture: `GateConfig("flow", start="mean")`.

    Raises ValueError for an unknown family, an option that the family does not have, or a value that is out of range.

    Attributes:
        family: the name of a family, one of `FAMILIES`.
        options: the family with its options, an object of its class.
    """

    family: str
    options: Family

    def __init__(self, family: str = "mole", **options: Any):
        _check_names(family, options)
        object.__setattr__(self, "family", family)
        object.__setattr__(self, "options", FAMILIES[family](**options))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateConfig:
        """The inverse of `to_dict`; ValueError as above. The values may come from anywhere."""
        options = {name: value for name, value in values.items() if name != "family"}
        _check_names(values.get("family", "mole"), options)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The family and its options."""
        return {"family": self.family, **asdict(self.options)}


def _check_names(family: Any, options: Collection[Any]) -> None:
    if family not in list(FAMILIES):  # whatever it is, also what cannot be hashed
        raise ValueError(f"unknown gate family {family!r}; known: {list(FAMILIES)}")
    own = [field.name for field in fields(FAMILIES[family])]
    if foreign := [name for name in options if name not in own]:
        raise ValueError(f"{family!r} gates have no option {foreign[0]!r}; their options: {own}")
