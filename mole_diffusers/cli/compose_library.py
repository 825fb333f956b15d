"""`mole compose-library`: a prompt with the LoRAs that it asks for, found in a library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from mole_diffusers.cli.common import (
    THRESHOLD,
    WORLD,
    BaseOption,
    CountOption,
    DeviceOption,
    EncoderOption,
    GuidanceOption,
    JsonOption,
    LibraryOption,
    StepsOption,
    ThresholdOption,
    VerboseOption,
    pipeline,
)
from mole_diffusers.cli.compose import FirstSeedOption, RowsOption, SheetOption, row_seeds, write_sheet
from mole_diffusers.cli.retrieve import in_words, open_library

Mode = Literal["selection", "mixture", "sum", "fusion"]


def compose_library(
    prompt: Annotated[str, Argument(help="What to draw.")],
    library: LibraryOption,
    mode: Annotated[
        Mode,
        Option(help="sum: each LoRA at its full strength. mixture: each at 1/N. selection: the best one. fusion: merged."),
    ] = "sum",
    k: CountOption = 3,
    threshold: ThresholdOption = THRESHOLD,
    encoder: EncoderOption = None,
    gates: Annotated[str, Option(help="Trained gates (a folder or a hub id) or a family.")] = "sum",
    base: BaseOption = WORLD,
    device: DeviceOption = None,
    seed: FirstSeedOption = 0,
    rows: RowsOption = 4,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 3.0,
    out: SheetOption = Path("grid.png"),
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find the LoRAs that a prompt asks for in a library, and draw it without and with them."""
    from mole_diffusers.inspection.compare import sample
    from mole_diffusers.retrieval.composing import composed, report

    if "<lora:" in prompt:
        raise ValueError("the library chooses the LoRAs; leave <lora:...> tags out of the prompt")
    seeds = row_seeds(seed, rows)
    pipe = pipeline(base, device)
    found_in = open_library(library, pipe, encoder)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    pictures = {"base": sample(pipe, prompt, seeds, **call)}
    with composed(found_in, pipe, prompt, mode=mode, k=k, threshold=threshold, gates=gates) as composition:
        pictures[f"found ({mode})"] = sample(pipe, prompt, seeds, **call)
    write_sheet(pictures, seeds, out)
    found, weights = composition.found[0], composition.sets[0]
    if as_json:
        facts = {"out": str(out), "prompt": prompt, "found": report(found_in, found), "weights": weights}
        print(json.dumps(facts | {"mode": mode, "gates": gates}))
        return
    shares = ", ".join(f"{name} x {weight:.3g}" for name, weight in weights.items()) or "the base alone"
    print(f"{in_words(found, found_in)}\ndrawn with {shares}, {mode}: {out}")
