"""`mole index`: make a folder of LoRAs a library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument

from mole_diffusers.cli import options
from mole_diffusers.cli.common import pipeline
from mole_diffusers.cli.options import WORLD


def index(
    library: Annotated[Path, Argument(metavar="FOLDER", help="LoRA files, in subfolders too.")],
    encoder: options.Encoder = None,
    base: options.Base = WORLD,
    base_config: options.BaseConfig = None,
    device: options.Device = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a folder of LoRAs a library, in which prompts find the LoRAs they ask for."""
    from mole_diffusers.retrieval.encoders import text_encoder_for
    from mole_diffusers.retrieval.library import LoraLibrary

    made = LoraLibrary.index(library, text_encoder_for(pipeline(base, device, config=base_config), encoder))
    if as_json:
        print(json.dumps({"loras": [entry.name for entry in made.entries], "skipped": made.skipped}))
        return
    print(f"{library}: {len(made.entries)} LoRAs")
    for file, why in made.skipped.items():
        print(f"left out {file}: {why}")
