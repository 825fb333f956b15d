"""A mixture as a folder: its experts, gates, strengths and binding. A drop-in saves it with the pipeline."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mole_diffusers.binding.config import Bound, from_json, to_json
from mole_diffusers.lora import Expert, LoraWeights, read_expert
from mole_diffusers.lora.strengths import finite
from mole_diffusers.lora.writing import save_expert
from mole_diffusers.merging.layers import weights_by_key
from mole_diffusers.mixture import Mixture, attach, attached
from mole_diffusers.patching.install.installation import lock_of_pipeline
from mole_diffusers.pipelines.adapter_weights import AdapterWeights, weights_by_block
from mole_diffusers.safe_files import RefusedFileError, read_json
from mole_diffusers.whole_files import new_folder, whole_folder

VERSION = 1
MAX_INDEX = 256 << 20  # bytes; it contains mask pictures
MAX_MASKS = 128 << 20  # pixels of all masks; a white one takes a thousandth of that in a file
INDEX, EXPERTS, GATES_FOLDER = "mixture.json", "experts", "gates"
FILE = re.compile(r"[0-9]{1,4}\.safetensors")  # as `keep` names them; expert names may hold characters that paths cannot


def keep(mixture: Mixture, folder: str | Path) -> None:
    """Write what `attach_kept` reads: mixture.json, experts/ and gates/. Everything else in `folder` is removed.

    An expert's file is copied unchanged if the copy alone is that expert. If not, it is written in fp32: if it is only
    in memory or was changed there, if its file has changed since, or if files next to that gave its scales or trigger
    words. What holds only inside a `with` block of the mixture is not written.
    """
    with new_folder(folder) as part:
        (part / EXPERTS).mkdir()
        kept, rows, now = {}, [], mixture.parts.persistent_settings()
        by_block = weights_by_block(now.plan)
        for i, (name, (expert, strength)) in enumerate(now.experts.items()):
            file = f"{i}.safetensors"
            kept[name] = _keep_expert(expert, part / EXPERTS / file)
            rows.append({"name": name, "file": file, "strength": strength, "active": name in now.active})
            if name in by_block:
                rows[-1]["weights"] = by_block[name]
            if now.binding is not None:
                rows[-1]["binding"] = to_json(now.binding[name])
        mixture.save_pretrained(part / GATES_FOLDER, experts=kept)
        about = {"format": "mole_diffusers.mixture", "version": VERSION, "experts": rows}
        (part / INDEX).write_text(json.dumps(about, indent=1) + "\n")


def _keep_expert(expert: Expert, path: Path) -> Expert:
    if Path(expert.source).is_file():
        shutil.copyfile(expert.source, path)
        with suppress(RefusedFileError):
            copy = read_expert(path, expert.name)
            if copy.triggers == expert.triggers and _same_weights(copy, expert) and _same_embeddings(copy, expert):
                return copy
    # Files with diffusers' keys have no embeddings.
    save_expert(expert, path, format="kohya" if expert.embeddings else "diffusers", dtype=torch.float32)
    return read_expert(path, expert.name)


def _same_weights(copy: Expert, expert: Expert) -> bool:
    mine, theirs = weights_by_key(copy), weights_by_key(expert)
    return mine.keys() == theirs.keys() and all(
        w.scale == theirs[key].scale
        and torch.equal(w.down, theirs[key].down)
        and torch.equal(w.up, theirs[key].up)
        and torch.equal(_magnitude(w), _magnitude(theirs[key]))
        for key, w in mine.items()
    )


def _same_embeddings(copy: Expert, expert: Expert) -> bool:
    mine, theirs = ({(w, part): v for w, own in e.embeddings.items() for part, v in own.items()} for e in (copy, expert))
    return mine.keys() == theirs.keys() and all(torch.equal(v, theirs[key]) for key, v in mine.items())


def _magnitude(weights: LoraWeights) -> torch.Tensor:
    return torch.empty(0) if weights.magnitude is None else weights.magnitude


def attach_kept(pipe: Any, folder: str | Path) -> Mixture:
    """Attach the mixture that `keep` wrote.

    Raises FileNotFoundError or RefusedFileError for any other folder, and everything that `attach` raises.
    """
    folder = whole_folder(Path(folder))
    kept = _kept_experts(folder, getattr(pipe, "unet", None))
    with lock_of_pipeline(pipe):  # so that nothing is drawn with experts that are off
        # What was kept had been attached, so missing layers were asked for.
        gates, binding = folder / GATES_FOLDER, kept.binding or None
        mixture = attach(pipe, kept.experts, gates, binding=binding, allow_missing_layers=True)
        choose(pipe, {name: strength for name, (_, strength) in kept.experts.items() if name in kept.active}, kept.weights)
    return mixture


def choose(pipe: Any, strengths: Mapping[str, float], by_block: Mapping[str, Mapping[str, Any]]) -> None:
    """Set exactly these experts of a pipeline's mixture at these strengths, some with weights by model and block."""
    mixture = attached(pipe)
    if mixture is not None:
        names, unet = list(mixture.experts), getattr(pipe, "unet", None)
        mixture.parts.choose(strengths, AdapterWeights(names, by_block, unet) if by_block else None)


class _Kept(NamedTuple):
    """What a folder's mixture.json says of each expert, by name."""

    experts: dict[str, tuple[Path, float]]  # file and strength
    active: set[str]
    binding: dict[str, Bound]  # empty if nothing is bound
    weights: dict[str, Mapping[str, Any]]  # by model and block, of those that have more than one strength


def _kept_experts(folder: Path, unet: Any) -> _Kept:
    """The experts of a folder, for a pipeline with this `unet`, if any."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is no kept mixture: it has no {INDEX}")
    about = read_json(folder / INDEX, limit=MAX_INDEX)
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != ("mole_diffusers.mixture", VERSION):
        raise RefusedFileError(f"{folder / INDEX} is not of format mole_diffusers.mixture, version {VERSION}")
    kept, pixels, rows = _Kept({}, set(), {}, {}), 0, about.get("experts")
    for row in rows if isinstance(rows, list) and rows else [{}]:
        try:
            name, file = str(row["name"]), row["file"]
            strength = finite(name, row["strength"])
            binding = from_json(row["binding"], name) if "binding" in row else None
            weights = AdapterWeights([name], {name: row["weights"]}, unet).weights if "weights" in row else {}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RefusedFileError(f"{folder / INDEX} is not complete: {error!r}") from error
        if not isinstance(file, str) or not FILE.fullmatch(file):
            raise RefusedFileError(f"{folder / INDEX}: {file!r} is not the name of a file in {EXPERTS}/")
        if binding is not None and isinstance(binding.region, Image.Image):
            pixels += binding.region.width * binding.region.height
        if pixels > MAX_MASKS:
            raise RefusedFileError(f"{folder / INDEX}: its masks have more than {MAX_MASKS} pixels")
        source = folder / EXPERTS / file
        is_twice = name in kept.experts or any(source == other for other, _ in kept.experts.values())
        if is_twice or not source.is_file():
            raise RefusedFileError(f"{folder / INDEX}: expert {name!r} must come once, with its own file in {EXPERTS}/")
        kept.experts[name] = source, strength
        kept.active.update([name] if row.get("active", True) else [])
        kept.binding.update({} if binding is None else {name: binding})
        kept.weights.update({} if not weights.get(name) else weights)
    return kept
