"""What the commands share: how they open pipelines, LoRAs, libraries and pictures, and write them.

Nothing here or in a command imports torch before the command runs, so that `mole --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_app.studio.model_folders import find_base
from mole_app.studio.names import WORLD
from mole_cli.console import busy, hide_loading_bars, note
from mole_diffusers.binding import spans

if TYPE_CHECKING:
    from PIL import Image

    from mole_app.studio.base_models import Base
    from mole_app.studio.catalog import Catalog
    from mole_app.studio.recipe import Recipe
    from mole_app.studio.render import Studio
    from mole_diffusers.lora import Expert


def check_base(base: str) -> None:
    """Raises ValueError, before anything is loaded, for a base that is not there. A folder is read later."""
    if base != WORLD and not Path(base).exists():
        find_base(base)


def opened(base: str, asked: Mapping[str, Any], *, says: bool = False) -> Base:
    """Open the pipeline of --base. Its calls show a progress bar if they take two seconds or more.

    Args:
        asked: options by name, of which those of `studio.memory.Memory` and base_config are read.
        says: whether to report on stderr how it was opened.
    """
    hide_loading_bars()
    from mole_app.studio.base_models import open_base
    from mole_app.studio.memory import Memory

    memory = {field.name: asked[field.name] for field in fields(Memory) if asked.get(field.name) is not None}
    with busy(f"loading {base}"):
        found = open_base(base, config=asked.get("base_config"), memory=Memory(**memory))
    found.pipe.set_progress_bar_config(delay=2, leave=False)
    if says:
        print(found, file=sys.stderr)
    return found


def named_values(texts: Sequence[str], option: str, known: Collection[str] | None = None) -> dict[str, str]:
    """NAME=VALUE texts as name -> value. Raises ValueError like `grouped_values`, and for a name that is given twice."""
    groups = grouped_values(texts, option, known)
    if twice := [name for name, values in groups.items() if len(values) > 1]:
        raise ValueError(f"{option} {twice[0]!r} is given more than once: {groups[twice[0]]}")
    return {name: value for name, (value,) in groups.items()}


def once(pairs: Iterable[tuple[str, Any]], option: str) -> dict[str, Any]:
    """Pairs as name -> value. Raises ValueError for a name that is given twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{option} {name!r} is given more than once")
        found[name] = value
    return found


def grouped_values(texts: Sequence[str], option: str, known: Collection[str] | None = None) -> dict[str, list[str]]:
    """NAME=VALUE texts as name -> values.

    Raises ValueError, with the option and the text, for a text of another form or an unknown name; with `known` None,
    all names are allowed.
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ValueError(f"{option} {text!r} is not NAME=VALUE")
        if known is not None and name not in known:
            raise ValueError(f"{option} {name!r}: no such LoRA; known: {sorted(known)}")
        groups.setdefault(name, []).append(value)
    return groups


def json_or_text(text: str) -> Any:
    """Parse JSON, such as a number or a list; anything else stays text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_file(text: str) -> tuple[Path, float]:
    """FILE[:STRENGTH] as (file, strength), 1 by default. Raises ValueError if the strength is not a number."""
    file, colon, strength = text.rpartition(":")
    if not colon or "/" in strength or "\\" in strength or strength.endswith(".safetensors"):  # such as the colon of a drive
        return Path(text), 1.0
    try:
        return Path(file), float(strength)
    except ValueError:
        raise ValueError(f"{text!r}: the strength {strength!r} is not a number") from None


def lora_files(files: Mapping[str, str]) -> dict[str, tuple[Path, float]]:
    """Name -> FILE[:STRENGTH], as name -> (file, strength). Raises FileNotFoundError before anything is loaded."""
    parsed = {name: parse_file(text) for name, text in files.items()}
    if gone := [path for path, _ in parsed.values() if not path.exists()]:
        raise FileNotFoundError(f"no LoRA file at {gone[0]}")
    return parsed


def read_experts(files: Mapping[str, str]) -> dict[str, tuple[Expert, float]]:
    """Name -> FILE[:STRENGTH], as name -> (LoRA, strength)."""
    parsed = lora_files(files)
    from mole_diffusers.lora import read_expert

    return {name: (read_expert(path, name), strength) for name, (path, strength) in parsed.items()}


def experts_for(base: str, files: Mapping[str, str], prompt: str) -> dict[str, tuple[Expert, float]]:
    """The LoRAs of --expert. In the emoji world, by default those that the prompt names, in its order."""
    if files:
        return read_experts(files)
    if base != WORLD:
        raise ValueError("give at least one --expert NAME=FILE[:STRENGTH]")
    from mole_world.world import concept_files

    known = concept_files()
    at = {name: found[0] for name in known if (found := spans(prompt, name))}
    if not at:
        raise ValueError(f"the prompt names none of the world's concepts: {', '.join(known)}")
    return read_experts({name: str(known[name]) for name in sorted(at, key=at.__getitem__)})


def open_catalog(bases: Collection[str], asked: Mapping[str, Any], experts: Sequence[str] = ()) -> Catalog:
    """The LoRAs of --loras and --expert and the gates of --trained, plus those of the emoji world if it is a base.

    Without --loras, the LoRAs are those in the program, or else in the folder, that a base belongs to.
    """
    from mole_app.studio.catalog import Catalog, folder_gates
    from mole_app.studio.model_folders import around, files_of, loras_beside

    examples = dict[str, Path]()
    found = [path for base in bases if base != WORLD and isinstance(path := find_base(base), Path)]
    files = loras_beside(found) if asked.get("loras") is None else files_of(asked["loras"], "lora")

    folders = {
        "embedding": asked.get("embeddings"),
        "upscaler": asked.get("upscalers"),
        "controlnet": asked.get("controlnets"),
    }
    folders |= {"ip_adapter": asked.get("ip_adapters"), "clip_vision": asked.get("image_encoders")}
    others = {
        kind: dict(ChainMap(*(around(base, kind) for base in found))) if folder is None else files_of(folder, kind)
        for kind, folder in folders.items()
    }
    if WORLD in bases:
        from mole_world.world import concept_files, gate_folders

        files, examples = concept_files() | files, gate_folders()
    catalog = Catalog(files, examples, examples=examples, files=others)
    for name, file in named_values(experts, "--expert").items():
        catalog.add_lora(name, Path(file))
    if (folder := asked.get("trained")) is not None:
        if not (trained := folder_gates(folder)):
            raise ValueError(f"--trained {folder} has no gates, one folder each, as `mole train` writes them")
        for name, folder in trained.items():
            catalog.add_gates(name, folder)
    return catalog


def target(out: Path | None, default: str, *, overwrite: bool) -> Path:
    """The path of the result: --out, or a free name of the default (grid.png, grid-2.png, ...).

    Raises ValueError if --out is a folder, has another type than the default, or exists already and --overwrite is not
    given.
    """
    if out is None:
        path = Path(default)
        names = (path.with_stem(f"{path.stem}-{i}") for i in range(2, 1_000_000))
        return path if overwrite or not path.exists() else next(name for name in names if not name.exists())
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give the name of a file in it")
    if out.suffix.lower() != (kind := Path(default).suffix):
        raise ValueError(f"--out {out} must be the name of a {kind} file, since that is what this writes")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there already; give another --out, or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def first_recipe(studio: Studio, **changes: Any) -> Recipe:
    """A recipe at the base's usual guidance, with those of `changes` that are not None."""
    from mole_app.studio.base_models import usual_guidance
    from mole_app.studio.recipe import Recipe

    own = {"guidance": usual_guidance(studio.base.pipe, studio.base.name), "base": studio.base.name}
    given = {name: value for name, value in changes.items() if value is not None}
    return Recipe(**{"prompt": "", "gates": "auto", **own, **given})


def completed(studio: Studio, asked: Recipe, image: Image.Image | None = None) -> Recipe:
    """A recipe with every choice made. Notes for the user go to stderr.

    Args:
        image: the picture for img2img or inpainting.
    """
    recipe = studio.complete(asked)
    for each in studio.notes(asked, recipe, image):
        note(each)
    return recipe
