"""Files that visitors upload and download, above all trained gates as a pair of files.

The pair is a .safetensors with the weights and a .json with their config.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mole_app.studio.catalog import Catalog
from mole_app.studio.names import matching
from mole_app.web.sentences import without_folders
from mole_diffusers.binding import AUTO
from mole_diffusers.gates import GATE_CONFIG, GATE_TYPES, GATE_WEIGHTS, load_gates

GATES = {".safetensors": (GATE_WEIGHTS, 256 << 20), ".json": (GATE_CONFIG, 1 << 20)}  # name here, most bytes
MOST_KEPT = 16 << 30  # bytes of all that visitors upload
GATES_NAME = re.compile(r"[\w+ -]{1,60}")


@contextmanager
def uploaded(*paths: Path) -> Iterator[Path]:
    """Gives the first of the files that a visitor has sent. If reading raises ValueError, all of them are deleted."""
    try:
        yield paths[0]
    except ValueError:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def check_room(kept: Iterable[Path], new: Iterable[Path]) -> None:
    """Raises ValueError if the files that are kept and the new ones are more than `MOST_KEPT` together."""
    if sum(path.stat().st_size for path in (*kept, *new) if path.is_file()) > MOST_KEPT:
        raise ValueError(f"there is no room: uploads take at most {MOST_KEPT >> 30} GiB here; delete some first")


def check_gates_name(name: str) -> str:
    """Returns the name if gates (and their folder) can have it. Raises ValueError if not."""
    if not GATES_NAME.fullmatch(name) or name != name.strip():
        raise ValueError(f"a name has letters, digits, spaces, + - and _, at most 60, got {name!r}")
    if name in (*GATE_TYPES, AUTO):
        raise ValueError(
            f"{name!r} is {'a choice among gates' if name == AUTO else 'the name of a gate type'}; choose another"
        )
    return name


def default_gates_name(loras: Iterable[str]) -> str:
    """A name that gates for these LoRAs can have, for example "fox+ink"."""
    return re.sub(r"[^\w+ -]", "_", "+".join(sorted(loras)))[:60].strip()


def describe_gates(catalog: Catalog, name: str) -> dict[str, Any]:
    """Name, gate type and LoRAs of trained gates, and which of these LoRAs are missing here or are another file."""
    saved = load_gates(catalog.gates_source(name))
    here = [expert for expert in saved.experts if expert in catalog.loras]
    return {
        "name": name,
        "gate_type": saved.config.gate_type,
        "experts": list(saved.experts),
        "other_files": catalog.other_files(name, here),
        "missing": [expert for expert in saved.experts if expert not in here],
    }


def describe_all_gates(catalog: Catalog) -> list[dict[str, Any]]:
    """`describe_gates` of all trained gates; for those that cannot be read, their name and why ("unreadable")."""
    found = []
    for name in catalog.gates:
        try:
            found.append(describe_gates(catalog, name))
        except (ValueError, OSError) as error:
            found.append({"name": name, "unreadable": without_folders(str(error))})
    return found


def export_gates(catalog: Catalog, name: str, folder: Path) -> list[Path]:
    """Copy the two files of trained gates into `folder`, named after the gates. Returns their paths."""
    if name not in catalog.gates:
        raise ValueError(f"there are no trained gates {name!r}; known: {', '.join(catalog.gates) or 'none'}")
    source = catalog.gates[name]
    return [Path(shutil.copyfile(source / file, folder / f"{name}{suffix}")) for suffix, (file, _) in GATES.items()]


def import_gates(catalog: Catalog, files: Sequence[Path], name: str, *, home: Path) -> str:
    """Copy uploaded gates to `home / name`, add them to the catalog, and return the name. "" becomes e.g. "fox+ink".

    Raises ValueError for anything but one good pair of files, for a name that is taken, and if there is no room.
    """
    with uploaded(*files):
        by_suffix = {path.suffix.lower(): path for path in files}
        if len(files) != 2 or set(by_suffix) != set(GATES):
            raise ValueError(f"gates are two files, one .safetensors and one .json, got {[path.name for path in files]}")
        home.mkdir(parents=True, exist_ok=True)
        check_room(home.glob("*/*"), files)
        with TemporaryDirectory(prefix=".new-", dir=home) as folder:  # a new one each time: two visitors may upload at once
            new = Path(folder, "gates")
            new.mkdir()
            for suffix, (file, most) in GATES.items():
                if by_suffix[suffix].stat().st_size > most:
                    raise ValueError(f"{by_suffix[suffix].name} is larger than {most >> 20} MiB")
                shutil.copyfile(by_suffix[suffix], new / file)
            try:
                saved = load_gates(new)
            except ValueError as error:
                raise ValueError(str(error).replace(f"{new}/", "").replace(str(new), "these files")) from error
            name = check_gates_name(name.strip() or default_gates_name(saved.experts))
            if matching(name, catalog.gates) is not None or (home / name).exists():
                raise ValueError(f"there are already gates {name!r}; give another name")
            catalog.add_gates(name, new.rename(home / name))
        return name
