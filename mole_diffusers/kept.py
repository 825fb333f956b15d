"""A whole mixture in one folder: its experts' files, its gates and the user's strengths."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from mole_diffusers import checkpoint
from mole_diffusers.attaching import attach
from mole_diffusers.lora_files import Expert, read_expert
from mole_diffusers.mixture import Mixture
from mole_diffusers.safe_files import RefusedFileError, read_json
from mole_diffusers.saving import save_expert

VERSION = 1
INDEX, EXPERTS, GATES = "mixture.json", "experts", "gates"
FILE = re.compile(r"[0-9]{1,4}\.safetensors")  # as `keep` names them; a name may hold what no path can


def keep(mixture: Mixture, folder: str | Path) -> None:
    """Write what `attach_kept` reads: mixture.json, experts/ and gates/.

    An expert's file is copied as it is. One that is in memory alone, or was changed since, is written in fp32.
    """
    folder = Path(folder)
    (folder / EXPERTS).mkdir(parents=True, exist_ok=True)
    kept, rows = {}, []
    for i, (name, (expert, strength)) in enumerate(mixture.weighed().items()):
        file = f"{i}.safetensors"
        kept[name] = _keep_expert(expert, folder / EXPERTS / file)
        rows.append({"name": name, "file": file, "strength": strength})
    checkpoint.save(folder / GATES, mixture.banks, mixture.config, experts=kept)
    about = {"format": "mole_diffusers.mixture", "version": VERSION, "experts": rows}
    (folder / INDEX).write_text(json.dumps(about, indent=1) + "\n")


def _keep_expert(expert: Expert, path: Path) -> Expert:
    if Path(expert.source).is_file():
        shutil.copyfile(expert.source, path)
        if (copy := read_expert(path, expert.name)).sha256 == expert.sha256:
            return copy
    save_expert(expert, path, dtype=torch.float32)
    return read_expert(path, expert.name)


def attach_kept(pipe: Any, folder: str | Path) -> Mixture:
    """Attach the mixture that `keep` wrote.

    Raises FileNotFoundError or RefusedFileError for what is no such folder, and all that `attach` raises.
    """
    folder = Path(folder)
    return attach(pipe, _experts(folder), folder / GATES)


def _experts(folder: Path) -> dict[str, tuple[str | Path | Expert, float]]:
    """name -> (file, strength), from mixture.json."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is no kept mixture: it has no {INDEX}")
    about = read_json(folder / INDEX)
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != ("mole_diffusers.mixture", VERSION):
        raise RefusedFileError(f"{folder / INDEX} is not of format mole_diffusers.mixture, version {VERSION}")
    found: dict[str, tuple[str | Path | Expert, float]] = {}
    rows = about.get("experts")
    for row in rows if isinstance(rows, list) and rows else [{}]:
        try:
            name, file, strength = str(row["name"]), row["file"], float(row["strength"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RefusedFileError(f"{folder / INDEX} is not complete: {error!r}") from error
        if not isinstance(file, str) or not FILE.fullmatch(file):
            raise RefusedFileError(f"{folder / INDEX}: {file!r} is not the name of a file in {EXPERTS}/")
        if name in found or not math.isfinite(strength) or not (folder / EXPERTS / file).is_file():
            raise RefusedFileError(
                f"{folder / INDEX}: expert {name!r} must come once, with a finite strength and a file in {EXPERTS}/"
            )
        found[name] = folder / EXPERTS / file, strength
    return found
