"""`mole index`, `retrieve` and `compose-library`: a folder of LoRAs, and those that a prompt asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import opened, pipeline
from mole_diffusers.cli.compose import PromptSheet, Sheet, started
from mole_diffusers.cli.options import THRESHOLD, WORLD

if TYPE_CHECKING:
    from mole_diffusers.retrieval.library import LoraLibrary, RetrievedLora

Mode = Literal["selection", "mixture", "sum", "fusion"]


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


@options.takes(sheet=Sheet, how=options.Drawing, opening=options.Opening)
def compose_library(
    prompt: Annotated[str, Argument(help="What to draw.")],
    library: options.Library,
    mode: Annotated[
        Mode,
        Option(help="sum: each LoRA at its full strength. mixture: each at 1/N. selection: the best one. fusion: merged."),
    ] = "sum",
    k: options.Count = 3,
    threshold: options.Threshold = THRESHOLD,
    encoder: options.Encoder = None,
    gates: Annotated[str, Option(help="Trained gates (a folder or a hub id) or a family.")] = "sum",
    base: options.Base = WORLD,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    sheet: options.Given,
    how: options.Given,
    opening: options.Given,
) -> None:
    """Find the LoRAs that a prompt asks for in a library, and draw it without and with them.

    They are bound, and drawn in tiles where there is room, as by mole draw.
    """
    from mole_diffusers.retrieval.composing import composed, report
    from mole_diffusers.studio.prompt_weights import tiled_prompt

    if "<lora:" in prompt:
        raise ValueError("the library chooses the LoRAs; leave <lora:...> tags out of the prompt")
    seeds, path = started(sheet)
    page = PromptSheet(opened(base, opening), prompt, seeds, how)
    found_in = open_library(library, page.pipe, encoder)
    page.draw("base")
    with composed(found_in, page.pipe, prompt, mode=mode, k=k, threshold=threshold, gates=gates) as composition:
        mixture = composition.mixture
        tiles = tiled_prompt(page.pipe, prompt, prompt_2=page.others["prompt_2"])
        with nullcontext() if mixture is None else mixture.tiled(always=False, **tiles):
            page.draw(f"found ({mode})")
    found, weights = composition.found[0], composition.sets[0]
    facts = page.save(path, found=report(found_in, found), weights=weights, mode=mode, gates=gates)
    if as_json:
        print(json.dumps(facts))
        return
    shares = ", ".join(f"{name} x {weight:.3g}" for name, weight in weights.items()) or "the base alone"
    print(f"{in_words(found, found_in)}\ndrawn with {shares}, {mode}: {path}")


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
