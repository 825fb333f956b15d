"""What is read from source files is what importing them gives."""

from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import get_type_hints

import pytest

from mole_diffusers.cli.declared import declared
from mole_diffusers.gates import FAMILIES

FILES = ("studio/recipe.py", "studio/memory.py", "gates/families")
CLASSES = [(path, name, twin) for path in FILES for name, twin in declared(path).items()]


@pytest.mark.parametrize(("path", "name", "twin"), CLASSES, ids=[name for _, name, _ in CLASSES])
def test_a_declared_class_is_the_real_one(path, name, twin):
    modules = {family.__name__: family.__module__ for family in FAMILIES.values()}
    module = modules[name] if path == "gates/families" else f"mole_diffusers.{path.removesuffix('.py').replace('/', '.')}"
    real = getattr(import_module(module), name)
    assert is_dataclass(real)
    assert twin.__doc__ == real.__doc__.replace("\n    ", "\n").rstrip()
    own = [field for field in fields(real) if field.name in twin.__annotations__]
    assert [field.name for field in fields(twin)] == [field.name for field in own] == [field.name for field in fields(real)]
    kinds = get_type_hints(real, include_extras=True)
    assert get_type_hints(twin, include_extras=True) == {field.name: kinds[field.name] for field in own}
    for field in own:
        stated = None if field.default is MISSING else field.default
        assert getattr(twin, field.name) in (stated, None), field.name


def test_every_family_is_declared_and_says_whether_it_learns():
    found = {twin.name: getattr(twin, "learns", True) for twin in declared("gates/families").values()}
    assert found == {name: family.learns for name, family in FAMILIES.items()}
