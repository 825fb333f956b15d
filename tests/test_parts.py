"""What stands on the plugin uses its public names alone, and the plugin knows nothing of it."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "mole_diffusers"
PARTS = {  # each imports only the plugin and the parts above it
    "mole_world": ROOT / "demos/emoji/mole_world",
    "rivals": ROOT / "demos/emoji/rivals",
    "mole_app": ROOT / "demos/app/mole_app",
    "mole_cli": ROOT / "demos/cli/mole_cli",
    "experiments": ROOT / "demos/emoji/experiments",
}
PARTS_OF_A_MIXTURE = re.compile(r"mixture\.parts$")  # other things, such as training data, have parts that are public
NEVER_IMPORTED = {"rivals", "experiments"}  # by other parts: they are not in the wheel


@cache
def tree(path):
    return ast.parse(path.read_text())


def imported(folder):
    """(path, module, name) of all that the files of a folder import; the name is None for a whole module."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from ((path, node.module, alias.name) for alias in node.names)


@cache
def public_names(module):
    """The names that a module of the plugin gives to everyone: those of a folder's stub, or of a module's `__all__`."""
    folder = ROOT.joinpath(*module.split("."))
    if (stub := folder / "__init__.pyi").exists():
        found = [alias.asname for node in tree(stub).body if isinstance(node, ast.ImportFrom) for alias in node.names]
        return {*found, "__version__"} if module == "mole_diffusers" else {*found}
    path = folder.with_suffix(".py")
    for node in tree(path).body if path.exists() else ():
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@cache
def private_attributes(folder):
    """The private attributes and methods that the files of a folder define, such as `_bank` in `self._bank = ...`."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_the_plugin_imports_nothing_of_what_stands_on_it():
    above = [(str(path), module) for path, module, _ in imported(PLUGIN) if module.split(".")[0] in PARTS]
    assert not above


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_the_plugin_and_the_parts_above_it(part):
    allowed = {*list(PARTS)[: list(PARTS).index(part)]} - NEVER_IMPORTED | {part}
    for path, module, _ in imported(PARTS[part]):
        root = module.split(".")[0]
        assert root not in PARTS or root in allowed, f"{path} imports {module}"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_public_names_of_the_plugin(part):
    mine = [each for each in imported(PARTS[part]) if each[1].split(".")[0] == "mole_diffusers"]
    assert not [
        f"{path.relative_to(ROOT)}: {module} {name}"
        for path, module, name in mine
        if not (name in public_names(module) if name else module == "mole_diffusers")
        and not (name and public_names(f"{module}.{name}"))
    ]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_reaches_into_no_object_of_the_plugin(part):
    private = private_attributes(PLUGIN) - private_attributes(PARTS[part])
    for path in PARTS[part].rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and (node.attr in private or PARTS_OF_A_MIXTURE.search(ast.unparse(node))):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert own, f"{path.relative_to(ROOT)}:{node.lineno}: .{node.attr}"
