"""A package's public names are imported when they are first used (PEP 562), so that importing the package takes no time.

They are listed once, as the imports of its `__init__.pyi`, which type checkers read as well.
"""

from __future__ import annotations

import ast
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package, whose `__init__.py` is `file`."""
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text("utf-8"))
    homes = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}

    def load(name: str) -> Any:
        """A public name, or a submodule such as `mole_diffusers.emoji`."""
        path = homes.get(name) or f"{package}.{name}"
        notices = logging.getLogger("transformers.utils.import_utils")
        notices.addFilter(_is_not_of_torchvision)
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
        finally:
            notices.removeFilter(_is_not_of_torchvision)
        value = getattr(module, name) if name in homes else module
        setattr(sys.modules[package], name, value)
        return value

    return load, sorted(homes)


def _is_not_of_torchvision(record: logging.LogRecord) -> bool:
    """False for the notice that Pillow prepares pictures if torchvision is not installed, which changes nothing."""
    return "requires torchvision (not installed)" not in record.getMessage()
