"""Drop-in pipelines: code written for diffusers' LoRA calls works unchanged, and gates compose what it loads.

A drop-in saves its mixture with the pipeline: experts, gates and strengths in one folder, see `kept.keep` and
`kept.attach_kept`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """A drop-in class, which `from mole_diffusers.pipelines import ...` finds, too."""
    if not name.startswith("MoLE"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mole_diffusers.pipelines import classes

    return getattr(classes, name)
