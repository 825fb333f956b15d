"""The scripts of the emoji world, imported as running one of them would import it."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def script():
    """script(name) -> a module of the scripts; all of them are forgotten afterwards, since their names are short."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(SCRIPTS))
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == SCRIPTS:
                del sys.modules[name]
