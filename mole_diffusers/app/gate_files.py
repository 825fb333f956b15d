"""Trained gates as files that come and go: a .safetensors with the weights, a .json with what they weigh."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mole_diffusers.gates import FAMILIES, checkpoint
from mole_diffusers.studio.catalog import Catalog

MAX_WEIGHTS, MAX_ABOUT = 256 << 20, 1 << 20  # bytes of the two files
NAME = re.compile(r"[\w+ -]{1,60}")


def checked_name(name: str) -> str:
    """A name that gates can have, which is also that of their folder. Raises ValueError for another."""
    if not NAME.fullmatch(name) or name != name.strip():
        raise ValueError(f"a name has letters, digits, blanks, + - and _, at most 60, got {name!r}")
    if name in FAMILIES:
        raise ValueError(f"{name!r} is the name of a family; choose another")
    return name


def gates_report(catalog: Catalog, name: str) -> dict[str, Any]:
    """What trained gates are, which LoRAs they weigh, and which of these are another file here or not here at all."""
    found = checkpoint.load(catalog.gates_source(name))
    here = [expert for expert in found.experts if expert in catalog.loras]
    return {
        "name": name,
        "family": found.config.family,
        "experts": list(found.experts),
        "other_files": catalog.other_files(name, here),
        "missing": [expert for expert in found.experts if expert not in here],
    }


def given_out(catalog: Catalog, name: str, folder: Path) -> list[Path]:
    """Copies of the two files in `folder`, called after the gates."""
    if name not in catalog.gates:
        raise ValueError(f"there are no trained gates {name!r}; known: {', '.join(catalog.gates) or 'none'}")
    ends = {checkpoint.WEIGHTS: ".safetensors", checkpoint.CONFIG: ".json"}
    return [Path(shutil.copyfile(catalog.gates[name] / file, folder / f"{name}{end}")) for file, end in ends.items()]


def taken_in(catalog: Catalog, files: Sequence[Path], name: str, *, home: Path) -> str:
    """Put uploaded files on the catalog and into `home / name`; the name, which is "fox+ink" say where none is given.

    Raises ValueError for anything but one good pair of files, and for a name that is taken.
    """
    weights, about = _pair(files)
    home.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=".new-", dir=home))  # of its own: two visitors may upload at once
    try:
        shutil.copyfile(weights, folder / checkpoint.WEIGHTS)
        shutil.copyfile(about, folder / checkpoint.CONFIG)
        found = checkpoint.load(folder)
        name = checked_name(name.strip() or "+".join(sorted(found.experts)))
        if name in catalog.gates or (home / name).exists():
            raise ValueError(f"there are already gates {name!r}; give another name")
        folder.rename(home / name)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{folder}/", "").replace(str(folder), "these files")) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    catalog.add_gates(name, home / name)
    return name


def _pair(files: Sequence[Path]) -> tuple[Path, Path]:
    by_end = {path.suffix.lower(): path for path in files}
    if len(files) != 2 or set(by_end) != {".safetensors", ".json"}:
        raise ValueError(f"gates are two files, one .safetensors and one .json, got {[path.name for path in files]}")
    for end, limit in ((".safetensors", MAX_WEIGHTS), (".json", MAX_ABOUT)):
        if by_end[end].stat().st_size > limit:
            raise ValueError(f"{by_end[end].name} is larger than {limit >> 20} MiB")
    return by_end[".safetensors"], by_end[".json"]
