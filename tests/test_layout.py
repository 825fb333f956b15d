"""The import order is the data flow."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mole_diffusers"
ORDER = [
    "safe_files",
    "whole_files",
    "devices",
    "lora_files",
    "lora_writing",
    "saving",
    "experts",
    "mixing",
    "kept_products",
    "gates",
    "words",
    "state",
    "processor",
    "calls",
    "places",
    "gated_layer",
    "carrier",
    "trace",
    "checkpoint",
    "card",
    "turns",
    "host_calls",
    "offloading",
    "parts",
    "folding",
    "mixture",
    "attaching",
    "merging",
    "kept",
    "prompt_syntax",
    "plan",
    "dropin",
    "pipelines",
    "library",
    "testing",
    "emoji",
    "judge",
    "world",
    "training",
    "compare",
    "figures",
    "recipe",
    "shelf",
    "drawing",
    "infotext",
    "grids",
    "as_code",
    "contributions",
    "gate_figures",
    "app",
    "evaluation",
    "bench",
    "cli",
]
FOLDERS = {
    "lora_files": [
        "expert",
        "unet_names",
        "transformer_names",
        "keys",
        "factors",
        "algorithms",
        "metadata",
        "families",
        "reading",
    ],
    "gates": ["contract", "controls", "prompt", "retrieval", "rank", "config", "constant", "mole", "flow", "bank", "build"],
    "merging": ["factors", "linear", "sparse", "lego", "regression", "layers", "activations", "merge"],
    "training": [
        "data",
        "losses",
        "beam",
        "denoising",
        "checkpoints",
        "engine",
        "lora_layers",
        "lora_saving",
        "concept",
        "prior",
        "clip",
        "study",
        "starts",
        "teachers",
        "distill",
        "collage",
        "rewards",
        "objectives",
        "config",
        "rates",
        "run",
        "loop",
        "card",
    ],
    "library": ["words", "ranking", "encoders", "cards", "store", "library", "composing"],
    "evaluation": [
        "statistics",
        "digests",
        "rows",
        "runner",
        "runtime",
        "arms",
        "choosing",
        "tables",
        "emoji_protocol",
        "checkpoint_protocol",
        "search",
        "plots",
        "reporting",
    ],
    "app": [
        "jobs",
        "cards",
        "previews",
        "finding",
        "gate_files",
        "looking",
        "actions",
        "teaching",
        "style",
        "page",
        "mixer",
        "compose_tab",
        "see_tab",
        "train_tab",
        "keep_tab",
        "api",
        "build",
    ],
    "cli": [
        "common",
        "libraries",
        "studio",
        "inspect",
        "index",
        "retrieve",
        "compose",
        "grid",
        "app",
        "train",
        "train_lora",
        "evaluate",
        "merge",
        "bench",
    ],
    "bench": ["hosts", "clock", "settings", "arms", "steps", "once", "memory", "shares", "report"],
}
MERGE_MATHS = ("factors", "linear", "sparse", "lego", "regression")


def imports(path):
    """Modules of the project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mole_diffusers"):
            names = [node.module] if node.module != "mole_diffusers" else [f"mole_diffusers.{a.name}" for a in node.names]
            yield from (n.removeprefix("mole_diffusers.") for n in names)


def test_every_file_has_its_place_in_the_order():
    assert {p.stem for p in PACKAGE.iterdir() if p.stem[0] != "_" and (p.is_dir() or p.suffix == ".py")} - {
        "emoji_assets"
    } == set(ORDER)
    for folder, names in FOLDERS.items():
        assert {p.stem for p in (PACKAGE / folder).glob("[a-z]*.py")} == set(names)


def test_files_import_only_from_above():
    for i, name in enumerate(ORDER):
        for path in (PACKAGE / name).glob("[a-z]*.py") if name in FOLDERS else [PACKAGE / f"{name}.py"]:
            for imported in imports(path):
                top, _, sub = imported.partition(".")
                if top == name:
                    order = FOLDERS[name]
                    assert order.index(sub) < order.index(path.stem), f"{path.name} imports {imported}"
                else:
                    assert ORDER.index(top) < i, f"{path.name} imports {imported}"


def test_maths_imports_torch_only():
    merges = [PACKAGE / "merging" / f"{name}.py" for name in MERGE_MATHS]
    inner = (("training", "losses"), ("lora_files", "factors"), ("library", "ranking"))
    files = (PACKAGE / "mixing.py", *(PACKAGE / folder / f"{name}.py" for folder, name in inner))
    for path in (*files, *merges):
        assert set(imports(path)) <= {f"merging.{name}" for name in MERGE_MATHS}
        roots = {n.module.split(".")[0] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
        roots |= {
            a.name.split(".")[0] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names
        }
        assert roots <= {"__future__", "collections", "math", "mole_diffusers", "torch", "typing"}


def test_only_the_carrier_touches_peft():
    users = [p.name for p in PACKAGE.rglob("*.py") if "from peft" in p.read_text() or "import peft" in p.read_text()]
    assert users == ["carrier.py"]
