"""What the two training commands share: settings from a file and flags, pictures, and this process among others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

if TYPE_CHECKING:
    from mole_diffusers.training.data import Samples

PICTURES, UPDATES = "What to learn from", "How to train"  # panels of the help

OutOption = Annotated[Path | None, Option(metavar="FOLDER", help="The result, checkpoints and the log go here.")]
ConfigOption = Annotated[
    Path | None,
    Option(metavar="FILE", help="YAML or JSON with any settings; options override it."),
]
WriteConfigOption = Annotated[Path | None, Option(metavar="FILE", help="Write all settings as YAML or JSON, and stop.")]
ResumeOption = Annotated[
    str | None, Option(metavar="latest|checkpoint-N", help="Go on with the run in --out; latest also starts a new one.")
]


def setting(config: type, name: str, help: str) -> Any:
    """The option for one field of a config, whose default the help shows."""
    default = getattr(config, name)
    return Option(help=help, show_default=False if default is None else str(default), rich_help_panel=UPDATES)


def read_settings(path: Path, sections: Sequence[str]) -> dict[str, Any]:
    """A YAML or JSON file of settings. Raises ValueError for an unknown section."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold sections of {list(sections)}")
    if unknown := set(found) - set(sections):
        raise ValueError(f"{path}: unknown sections {sorted(unknown)}; known: {list(sections)}")
    return found


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what `read_settings` reads: JSON where the file is named so, else YAML."""
    import yaml

    as_json = path.suffix == ".json"
    path.write_text(json.dumps(settings, indent=2) + "\n" if as_json else yaml.safe_dump(settings, sort_keys=False))


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of the options of a section."""
    return {name: value for name, value in values.items() if value is not None and value not in ([], {})}


def fields_of(config: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are named as fields of a config."""
    return {field.name: flags[field.name] for field in fields(config) if field.name in flags}


def samples(pipe: Any, folders: Sequence[str], *, prompt: str | None = None, side: int | None = None) -> Samples | None:
    """The pictures of folders as the pipeline's latents, cut to squares of `side` pixels; None without folders.

    Args:
        prompt: caption of pictures that have none.
        side: by default the pipeline's own.
    """
    from mole_diffusers.training.data import default_side, encode, read_folder, square

    pairs = [pair for folder in folders for pair in zip(*read_folder(folder, prompt=prompt), strict=True)]
    if not pairs:
        return None
    images, captions = zip(*pairs, strict=True)
    return encode(pipe, [square(image, side or default_side(pipe)) for image in images], captions)


def own_device() -> str | None:
    """The GPU of this process, which `accelerate launch` numbers."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def is_main_process() -> bool:
    """Whether this process writes what all of them made; MPICH and Open MPI number processes under names of their own."""
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"
