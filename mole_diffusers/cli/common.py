"""What several commands share: the base pipeline, and the experts that were asked for."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mole_diffusers.lora import COMPONENTS, Expert, read_expert


def add_experts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expert", action="append", default=[], metavar="NAME=FILE[:STRENGTH]", help="repeatable")
    parser.add_argument("--base", default="emoji", help="a diffusers pipeline; default: the embedded world")
    parser.add_argument("--device", default=None, help="default: cuda where there is one")


def chosen_device(device: str | None) -> str:
    """What `--device` means: without it the card, where there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def pipeline(base: str, device: str | None = None, *, half: bool = True) -> Any:
    """The pipeline of `--base`; "emoji" is the embedded world."""
    import torch
    from diffusers import DiffusionPipeline

    from mole_diffusers.emoji.world import emoji_world

    device = chosen_device(device)
    if base == "emoji":
        return emoji_world(device=device).pipe
    dtype = torch.float16 if half and device.startswith("cuda") else torch.float32
    return DiffusionPipeline.from_pretrained(base, torch_dtype=dtype).to(device)


def hosts(base: str) -> dict[str, Any]:
    """Part -> model of a pipeline that LoRAs can be matched with."""
    pipe = pipeline(base)
    return {part: getattr(pipe, part) for part in COMPONENTS if getattr(pipe, part, None) is not None}


def parse_expert(text: str) -> tuple[str, tuple[Path, float]]:
    """NAME=FILE[:STRENGTH] -> (name, (file, strength)); ValueError says what is wrong."""
    name, separator, file = text.partition("=")
    if not separator or not name or not file:
        raise ValueError(f"--expert {text!r} is not NAME=FILE[:STRENGTH]")
    stem, colon, strength = file.rpartition(":")
    if colon and "/" not in strength and "\\" not in strength and not strength.endswith(".safetensors"):
        try:
            return name, (Path(stem), float(strength))
        except ValueError:
            raise ValueError(f"--expert {text!r}: strength {strength!r} is not a number") from None
    return name, (Path(file), 1.0)


def chosen_experts(args: argparse.Namespace, prompt: str) -> dict[str, tuple[Expert, float]]:
    """The experts asked for, else those of the embedded world that the prompt names; read before a model is loaded."""
    if args.expert:
        chosen = dict(parse_expert(text) for text in args.expert)
    elif args.base != "emoji":
        raise ValueError("give at least one --expert NAME=FILE[:STRENGTH]")
    else:
        from mole_diffusers.emoji.world import concept_files

        known = concept_files()
        chosen = {name: (path, 1.0) for name, path in known.items() if f" {name} " in f" {prompt} "}
        if not chosen:
            raise ValueError(f"the prompt names none of the world's concepts: {', '.join(known)}")
    return {name: (read_expert(path, name), strength) for name, (path, strength) in chosen.items()}


def named_values(texts: Sequence[str], option: str) -> list[tuple[str, str]]:
    """NAME=VALUE texts as pairs; ValueError names the option and the text that is not one."""
    pairs = [text.partition("=") for text in texts]
    if bad := next(
        (t for t, (name, equals, value) in zip(texts, pairs, strict=True) if not (name and equals and value)), None
    ):
        raise ValueError(f"{option} {bad!r} is not NAME=VALUE")
    return [(name, value) for name, _, value in pairs]


def json_or_text(text: str) -> Any:
    """A number, list or the like as JSON has it; anything else is the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read_settings(path: Path, sections: Sequence[str]) -> dict[str, Any]:
    """A YAML or JSON file of settings; ValueError names an unknown section."""
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


def write_settings(path: Path, asked: Mapping[str, Any]) -> None:
    """The same, written: JSON where the name says so, else YAML."""
    import yaml

    plain = json.loads(json.dumps(asked))
    as_json = path.suffix == ".json"
    path.write_text(json.dumps(plain, indent=2) + "\n" if as_json else yaml.safe_dump(plain, sort_keys=False))


def given(section: Mapping[str, Any]) -> dict[str, Any]:
    """What of a section was asked for."""
    return {name: value for name, value in section.items() if value is not None and value not in ([], {})}


def own_device() -> str | None:
    """Under `accelerate launch` each process has a card of its own."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def is_main_process() -> bool:
    """Whether this process writes what all made together; MPICH and Open MPI number processes under names of their own."""
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def samples(pipe: Any, folders: Sequence[str], *, prompt: str | None = None, side: int | None = None) -> Any:
    """The pictures of folders as the pipeline's latents, cut to squares of `side` pixels; None without folders."""
    from mole_diffusers.training.data import default_side, encode, read_folder, square

    pairs = [pair for folder in folders for pair in zip(*read_folder(folder, prompt=prompt), strict=True)]
    if not pairs:
        return None
    images, captions = zip(*pairs, strict=True)
    return encode(pipe, [square(image, side or default_side(pipe)) for image in images], captions)
