"""What the commands that look into a library share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mole_diffusers.retrieval.encoders import text_encoder_for
from mole_diffusers.retrieval.library import THRESHOLD, LoraLibrary, RetrievedLora

ENCODER = "a sentence-transformers model, by name or folder; default: the text encoder of --base"


def add_search(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--library and the options of a search; --base and --device are the command's own."""
    parser.add_argument("--library", type=Path, metavar="DIR", required=required, help="a folder that `mole index` indexed")
    parser.add_argument("--encoder", help=f"as for mole index: {ENCODER}")
    parser.add_argument("--k", type=int, default=3, help="so many LoRAs at most, triggers apart; default: 3")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"least likeness without a trigger; default: {THRESHOLD}"
    )


def opened(args: argparse.Namespace, pipe: Any) -> LoraLibrary:
    """The library of --library, read by the encoder of --encoder."""
    return LoraLibrary.open(args.library, text_encoder_for(pipe, args.encoder))


def in_words(found: Sequence[RetrievedLora], library: LoraLibrary) -> str:
    """One line per LoRA: its name, and why it was chosen."""
    if not found:
        return f"the prompt asks for none of the {len(library.entries)} LoRAs in {library.folder}"
    return "\n".join(f"{each.name}: {each.why}" for each in found)
