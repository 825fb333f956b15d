"""What the two training commands share: options, settings from a file, pictures, and this process among others."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import pipeline
from mole_diffusers.cli.options import WORLD
from mole_diffusers.options import check_options

if TYPE_CHECKING:
    from mole_diffusers.training.data import Samples

PICTURES, UPDATES = "What to learn from", "How to train"  # panels of the help


class Run:
    """What is trained on, and where it is written."""

    base: Annotated[str | None, Option(**options.BASE, show_default=WORLD)] = None
    base_config: options.BaseConfig = None
    device: options.Device = None
    out: Annotated[Path | None, Option(metavar="FOLDER", help="The result, checkpoints and the log go here.")] = None
    config: Annotated[Path | None, Option(metavar="FILE", help="Any settings as YAML or JSON; options override it.")] = None
    write_config: Annotated[Path | None, Option(metavar="FILE", help="Write all settings as YAML or JSON, and stop.")] = None
    resume: Annotated[
        str | None,
        Option(metavar="latest|checkpoint-N", help="Go on with the run in --out; latest also starts a new one."),
    ] = None


EVERY_RUN = {  # settings that both trainings have -> help
    "steps": "Updates.",
    "precision": "no (full), bf16 or fp16.",
    "accumulation": "Compute a batch in so many parts, for less memory.",
    "checkpointing": "Less memory, more time.",
    "every": "Updates between checkpoints.",
    "keep": "How many checkpoints are kept.",
}


def updates(config: type, **helps: str) -> type:
    """A group of options for fields of a config, each with its help; the default is shown, unless the help tells it."""
    kinds, fields = get_type_hints(config), []
    for name, text in (helps | EVERY_RUN).items():
        default, flag = getattr(config, name), kinds[name] is bool
        shown = False if default is None or flag or "Default:" in text else str(default)
        option = Option(*[f"--{name}"] if flag else [], help=text, show_default=shown, rich_help_panel=UPDATES)
        fields.append((name, Annotated[kinds[name] | None, option], None))
    return make_dataclass("Learning", fields)


def settings(
    run: options.Given, sections: Mapping[str, options.Given], data: Sequence[str], **others: str | None
) -> dict[str, Any]:
    """Everything that was asked, as plain data: what the file of --config says, overridden by the options.

    Args:
        run: options of `Run`.
        sections: name -> what options say of it.
        data: folders of pictures.
        others: what else a file may hold beside sections.

    Raises ValueError for a file that is neither YAML nor JSON, or with an unknown section or one of another kind.
    """
    alone = {"base": run["base"], "base_config": run["base_config"], "data": data, **others}
    kinds = dict.fromkeys(("base", "base_config", *others), str) | dict.fromkeys(sections, Mapping[str, Any])
    file = _read(run["config"], kinds | {"data": Sequence[str]}) if run["config"] else {}
    merged = {name: file.get(name, {}) | given(section) for name, section in sections.items()}
    return {"base": WORLD, "data": [], **dict.fromkeys(others)} | file | merged | given(alone)


def _read(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a file that are not empty."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML, of which JSON is a part, but for numbers as 1e-3, which YAML 1.1 takes for text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        found = yaml.load(path.read_text(), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold sections of {list(kinds)}")
    found = {name: value for name, value in found.items() if value is not None}
    check_options(found, kinds, str(path))
    return found


def write_settings(path: Path, asked: Mapping[str, Any]) -> None:
    """Write what --config reads: JSON where the file is named so, else YAML."""
    import yaml

    as_json = path.suffix == ".json"
    path.write_text(json.dumps(asked, indent=2) + "\n" if as_json else yaml.safe_dump(asked, sort_keys=False))


def given(values: options.Given) -> dict[str, Any]:
    """What was given of the options of a section."""
    return {name: value for name, value in values.items() if value is not None and value not in ([], {})}


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
    side = default_side(pipe) if side is None else side
    return encode(pipe, [square(image, side) for image in images], captions)


def trained_pipeline(asked: Mapping[str, Any], device: str | None) -> Any:
    """The base in full precision, by default on the GPU of this process, which `accelerate launch` numbers."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    own = f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None
    return pipeline(asked["base"], device or own, config=asked.get("base_config"), dtype="float32", offload="none")


def is_main_process() -> bool:
    """Whether this process writes what all of them made; MPICH and Open MPI number processes under names of their own."""
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"
