"""Folders are stages of the flow, and a stage imports only from those above it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mole_diffusers"
STAGES = (
    "functional",
    "options",
    "lora",
    "gates",
    "binding",
    "patching",
    "mixture",
    "merging",
    "pipelines",
    "testing",
    "emoji",
    "retrieval",
    "inspection",
    "training",
    "studio",
    "evaluation",
    "app",
    "cli",
)
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
    "retrieval/ranking.py",
)


def imports(path):
    """Dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            own = node.module == "mole_diffusers"
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if own else (node.module,)


def files(stage):
    return [path] if (path := PACKAGE / f"{stage}.py").exists() else sorted((PACKAGE / stage).rglob("*.py"))


def test_every_folder_and_file_is_a_stage():
    found = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p.is_dir() and list(p.glob("*.py")))}
    assert found - {"__init__", "__main__"} == set(STAGES)


def test_a_stage_imports_only_from_those_above_it():
    for i, stage in enumerate(STAGES):
        for path in files(stage):
            own = (name.split(".")[1] for name in imports(path) if name.startswith("mole_diffusers."))
            below = [name for name in own if name in STAGES[i + 1 :]]
            assert not below, f"{path.relative_to(PACKAGE)} imports {below}"


def test_maths_imports_torch_only():
    allowed = {"__future__", "collections", "itertools", "math", "typing", "torch"}
    for name in TORCH_ONLY:
        others = {"mole_diffusers.functional", "mole_diffusers.merging.factors"}  # torch-only themselves
        roots = {n.split(".")[0] for n in imports(PACKAGE / name) if n not in others}
        assert roots <= allowed, f"{name} imports {sorted(roots - allowed)}"


def test_one_file_touches_peft():
    users = [p.name for p in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "peft" for n in imports(p))]
    assert users == ["peft_injection.py"]
