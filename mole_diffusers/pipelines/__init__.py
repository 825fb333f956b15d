"""Drop-in pipelines: code written for diffusers' LoRA calls works unchanged, and gates compose what it loads.

A drop-in saves its mixture with the pipeline: experts, gates and strengths in one folder, see `keep` and `attach_kept`.
"""

import importlib
from typing import Any

_MODULES = {"DropIn": "drop_in", "keep": "kept", "attach_kept": "kept"}


def __getattr__(name: str) -> Any:
    """A drop-in class, or another public name of the files here; it is imported when it is first used."""
    module = "classes" if name.startswith("MoLE") else _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
