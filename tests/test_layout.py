"""Folders are stages of the flow, and a stage imports only from those above it."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mole_diffusers"
STAGES = (
    "functional",
    "options",
    "safe_files",
    "whole_files",
    "lora",
    "gates",
    "binding",
    "patching",
    "mixture",
    "merging",
    "pipelines",
    "retrieval",
    "inspection",
    "training",
)
PARTS_OF_PATCHING = ("undo", "hooks", "host", "subjects", "gating", "install")
TORCH_ONLY = (
    "functional.py",
    "lora/factors.py",
    "binding/layout.py",
    "merging/factors.py",
    "merging/linear.py",
    "merging/sparse.py",
    "merging/lego.py",
    "merging/regression.py",
    "training/losses.py",
)


@cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path):
    """Dotted names that a file imports, wherever in it."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder = PACKAGE.parent.joinpath(*node.module.split("."))
            of_folder = node.module.startswith("mole_diffusers") and folder.is_dir()
            found += [f"{node.module}.{alias.name}" for alias in node.names] if of_folder else [node.module]
    return found


def files(stage, folder=PACKAGE):
    return [path] if (path := folder / f"{stage}.py").exists() else sorted((folder / stage).rglob("*.py"))


def test_every_folder_and_file_is_a_stage():
    found = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p.is_dir() and list(p.glob("*.py")))}
    assert found - {"__init__", "__main__"} == set(STAGES)


def test_a_stage_imports_only_from_those_above_it():
    for i, stage in enumerate(STAGES):
        for path in files(stage):
            own = (name.split(".")[1] for name in imports(path) if name.startswith("mole_diffusers."))
            below = [name for name in own if name in STAGES[i + 1 :]]
            assert not below, f"{path.relative_to(PACKAGE)} imports {below}"


def test_a_part_of_patching_imports_only_from_those_above_it():
    folder, before = PACKAGE / "patching", "mole_diffusers.patching."
    assert {p.stem for p in folder.iterdir() if p.name[0] != "_"} == set(PARTS_OF_PATCHING)
    for i, part in enumerate(PARTS_OF_PATCHING):
        for path in files(part, folder):
            own = (name.removeprefix(before).split(".")[0] for name in imports(path) if name.startswith(before))
            below = [name for name in own if name in PARTS_OF_PATCHING[i + 1 :]]
            assert not below, f"{path.relative_to(PACKAGE)} imports {below}"


def test_no_files_import_each_other():
    """Not even for annotations: `TopologicalSorter` raises CycleError, which names the circle."""
    modules = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    named = {name: path for name, path in modules.items() if not name.endswith("__init__")}
    graph = {name: {other for other in imports(path) if other in named} for name, path in named.items()}
    TopologicalSorter(graph).prepare()


def test_maths_imports_torch_only():
    allowed = {"__future__", "collections", "functools", "itertools", "math", "typing", "torch"}
    for name in TORCH_ONLY:
        others = {
            f"mole_diffusers.{name}" for name in ("functional", "merging.factors", "binding.layout")
        }  # torch-only themselves
        roots = {n.split(".")[0] for n in imports(PACKAGE / name) if n not in others}
        assert roots <= allowed, f"{name} imports {sorted(roots - allowed)}"


def test_one_file_touches_peft():
    users = [p.name for p in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "peft" for n in imports(p))]
    assert users == ["peft_injection.py"]
