"""The scripts of the experiments, imported as running one of them would import it."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "demos" / "experiments"


@contextmanager
def scripts(*folders: Path) -> Iterator:
    """import_module for scripts of these folders; all of them are forgotten afterwards, since their names are short."""
    names = [str(folder) for folder in folders]
    sys.path[:0] = names
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = [path for path in sys.path if path not in names]
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent in folders:
                del sys.modules[name]


@pytest.fixture(scope="module")
def script():
    """script(name) -> a module of the emoji experiments."""
    with scripts(*(EXPERIMENTS / "emoji" / name for name in ("data", "training", "studies"))) as found:
        yield found


@pytest.fixture(scope="module")
def second_world():
    """second_world(name) -> a module of the second world's scripts."""
    with scripts(EXPERIMENTS / "second_world") as found:
        yield found
