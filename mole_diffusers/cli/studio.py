"""What the commands that draw recipes share: a pipeline with a catalog of LoRAs and gates."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import pipeline


def add_studio(parser: argparse.ArgumentParser) -> None:
    """The options that `studio` reads."""
    parser.add_argument("--base", default="emoji", help="a diffusers pipeline; default: the embedded world")
    parser.add_argument("--loras", type=Path, help="a folder of .safetensors files; default: the embedded world's")
    parser.add_argument("--trained", type=Path, help="a folder with one folder of trained gates each")
    parser.add_argument("--device", default=None, help="default: cuda where there is one")


def studio(args: argparse.Namespace) -> Any:
    """The pipeline of --base with the LoRAs of --loras and the gates of --trained in its catalog."""
    from mole_diffusers.studio.catalog import Catalog, folder_gates, folder_loras
    from mole_diffusers.studio.render import Studio

    if args.base != "emoji" and args.loras is None:
        raise ValueError("give --loras FOLDER, the LoRA files for this base")
    catalog = Catalog({}, {})
    if args.base == "emoji":
        from mole_diffusers.emoji.world import concept_files, gate_folders

        catalog = Catalog(concept_files(), gate_folders())
    if args.loras is not None:
        catalog.loras |= folder_loras(args.loras)
    for name, folder in (folder_gates(args.trained) if args.trained else {}).items():
        catalog.add_gates(name, folder)
    pipe = pipeline(args.base, args.device)
    pipe.set_progress_bar_config(disable=True)
    return Studio(pipe, catalog, args.base)


def default_recipe(place: Any) -> Any:
    """A first recipe for a studio, at the pipeline's own size."""
    from mole_diffusers.studio.recipe import Recipe

    pipe = place.pipe
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    about: dict[str, Any] = {"width": side, "height": side, "gates": "auto", "base": place.base}
    if place.base == "emoji":
        return Recipe("noto drawing of a sunflower and a doughnut <lora:sunflower:1> <lora:doughnut:1>", **about)
    return Recipe("", guidance=7.0, **about)


def wanted_recipe(place: Any, args: argparse.Namespace) -> Any:
    """The recipe of a command's prompt, --seed, --steps, --guidance and --gates."""
    import dataclasses

    given = {name: getattr(args, name) for name in ("prompt", "seed", "steps", "guidance", "gates")}
    return dataclasses.replace(default_recipe(place), **given)
