"""The scripts of the emoji experiments, imported as running one of them would import it."""

import importlib
import sys
from pathlib import Path

import pytest

EMOJI = Path(__file__).parents[2] / "demos" / "experiments" / "emoji"


@pytest.fixture(scope="module")
def script():
    """script(name) -> the module; all of them are forgotten afterwards, since their names are short."""
    folders = [str(EMOJI / name) for name in ("data", "training", "studies")]
    sys.path[:0] = folders
    yield importlib.import_module
    sys.path[:] = [path for path in sys.path if path not in folders]
    for name, module in list(sys.modules.items()):
        if EMOJI in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]
