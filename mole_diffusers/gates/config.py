"""The gates of a mixture: a gate type and its options, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mole_diffusers.gates import types  # noqa: F401, which registers them
from mole_diffusers.gates.contract import GATE_TYPES, GateType

RECOMMENDED = next(name for name, gate_type in GATE_TYPES.items() if gate_type.recommended)


@dataclass(frozen=True, init=False)
class GateConfig:
    """The gates of a mixture: `GateConfig("flow", start="mean")`.

    Raises ValueError for an unknown gate type, an option that the gate type does not have, or a value that is out of range.

    Attributes:
        gate_type: the name of a gate type, one of `GATE_TYPES`.
        options: the gate type with its options, an object of its class.
    """

    gate_type: str
    options: GateType

    def __init__(self, gate_type: str = "mole", **options: Any):
        _check_names(gate_type, options)
        object.__setattr__(self, "gate_type", gate_type)
        object.__setattr__(self, "options", GATE_TYPES[gate_type](**options))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateConfig:
        """The inverse of `to_dict`; ValueError as above. The values may come from anywhere."""
        options = {name: value for name, value in values.items() if name != "gate_type"}
        _check_names(values.get("gate_type", "mole"), options)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The gate type and its options."""
        return {"gate_type": self.gate_type, **asdict(self.options)}


def _check_names(gate_type: Any, options: Collection[Any]) -> None:
    if gate_type not in list(GATE_TYPES):  # whatever it is, also what cannot be hashed
        raise ValueError(f"unknown gate type {gate_type!r}; known: {list(GATE_TYPES)}")
    own = [field.name for field in fields(GATE_TYPES[gate_type])]
    if foreign := [name for name in options if name not in own]:
        raise ValueError(f"{gate_type!r} gates have no option {foreign[0]!r}; their options: {own}")
