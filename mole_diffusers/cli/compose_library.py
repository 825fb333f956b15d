"""`mole compose-library`: a prompt with the LoRAs that it asks for, found in a library."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from typer import Argument, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import opened
from mole_diffusers.cli.compose import Sheet, call_options, drawn, other_prompts, started, write_sheet
from mole_diffusers.cli.options import THRESHOLD, WORLD
from mole_diffusers.cli.retrieve import in_words, open_library

Mode = Literal["selection", "mixture", "sum", "fusion"]


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
    """Find the LoRAs that a prompt asks for in a library, and draw it without and with them."""
    from mole_diffusers.retrieval.composing import composed, report

    if "<lora:" in prompt:
        raise ValueError("the library chooses the LoRAs; leave <lora:...> tags out of the prompt")
    seeds, path = started(sheet)
    pipe = opened(base, opening).pipe
    found_in = open_library(library, pipe, encoder)
    call = call_options(pipe, base, prompt, how, seeds)
    pictures = {"base": drawn(pipe, prompt, how, seeds, call)}
    with composed(found_in, pipe, prompt, mode=mode, k=k, threshold=threshold, gates=gates) as composition:
        pictures[f"found ({mode})"] = drawn(pipe, prompt, how, seeds, call)
    found, weights = composition.found[0], composition.sets[0]
    about: dict[str, Any] = {"prompt": prompt, **other_prompts(how), "found": report(found_in, found)}
    about |= {
        "weights": weights,
        "mode": mode,
        "gates": gates,
        "base": base,
        "seeds": seeds,
        "sampler": how["sampler"],
        **call,
    }
    write_sheet(pictures, seeds, path, about)
    if as_json:
        print(json.dumps({"out": str(path), **about}))
        return
    shares = ", ".join(f"{name} x {weight:.3g}" for name, weight in weights.items()) or "the base alone"
    print(f"{in_words(found, found_in)}\ndrawn with {shares}, {mode}: {path}")
