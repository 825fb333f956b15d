"""`mole retrieve`: the LoRAs of a library that a prompt asks for, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from mole_diffusers.cli import options
from mole_diffusers.cli.common import pipeline
from mole_diffusers.cli.options import THRESHOLD, WORLD

if TYPE_CHECKING:
    from mole_diffusers.retrieval.library import LoraLibrary, RetrievedLora


def retrieve(
    prompt: Annotated[str, Argument(help="What you want to draw.")],
    library: options.Library,
    k: options.Count = 3,
    threshold: options.Threshold = THRESHOLD,
    encoder: options.Encoder = None,
    base: options.Base = WORLD,
    base_config: options.BaseConfig = None,
    device: options.Device = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show which LoRAs of a library a prompt asks for, and why."""
    from mole_diffusers.retrieval.composing import report, retrieve_for

    pipe = pipeline(base, device, config=base_config)
    opened = open_library(library, pipe, encoder)
    found = retrieve_for(opened, pipe, prompt, k=k, threshold=threshold)
    print(json.dumps(report(opened, found), indent=1) if as_json else in_words(found, opened))


def open_library(folder: Path, pipe: Any, encoder: str | None) -> LoraLibrary:
    """The library of --library, read by the encoder of --encoder."""
    from mole_diffusers.retrieval.encoders import text_encoder_for
    from mole_diffusers.retrieval.library import LoraLibrary

    return LoraLibrary.open(folder, text_encoder_for(pipe, encoder))


def in_words(found: Sequence[RetrievedLora], library: LoraLibrary) -> str:
    """One line per LoRA: its name, and why it was chosen."""
    if not found:
        return f"the prompt asks for none of the {len(library.entries)} LoRAs in {library.folder}"
    return "\n".join(f"{each.name}: {each.why}" for each in found)
