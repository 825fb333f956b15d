"""`mole index`: make a folder of LoRAs a library."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import pipeline
from mole_diffusers.cli.libraries import ENCODER
from mole_diffusers.retrieval.encoders import text_encoder_for
from mole_diffusers.retrieval.library import LoraLibrary


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("index", help="make a folder of LoRAs a library that prompts can be looked up in")
    command.add_argument("library", type=Path, metavar="DIR")
    command.add_argument(
        "--base", default="emoji", help="the pipeline whose text encoder reads; default: the embedded world"
    )
    command.add_argument("--encoder", help=ENCODER)
    command.add_argument("--device", default=None, help="default: cuda where there is one")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Index the folder; files that are no LoRAs are named and left out."""
    library = LoraLibrary.index(args.library, text_encoder_for(pipeline(args.base, args.device), args.encoder))
    if args.json:
        print(json.dumps({"loras": [entry.name for entry in library.entries], "skipped": library.skipped}))
        return 0
    print(f"{args.library}: {len(library.entries)} LoRAs")
    for file, why in library.skipped.items():
        print(f"left out {file}: {why}")
    return 0
