"""`mole compose-library`: a prompt with the LoRAs that it asks for, found in a library."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from typer import Argument, Option

from mole_diffusers.cli.common import (
    THRESHOLD,
    WORLD,
    BaseOption,
    CountOption,
    DeviceOption,
    EncoderOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    LibraryOption,
    NegativeOption,
    OverwriteOption,
    SamplerOption,
    StepsOption,
    ThresholdOption,
    VerboseOption,
    WidthOption,
    opens_base,
    pipeline,
    target,
)
from mole_diffusers.cli.compose import (
    FirstSeedOption,
    RowsOption,
    SheetOption,
    call_options,
    drawn,
    row_seeds,
    write_sheet,
)
from mole_diffusers.cli.retrieve import in_words, open_library

Mode = Literal["selection", "mixture", "sum", "fusion"]


@opens_base
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
    guidance: GuidanceOption = None,
    negative: NegativeOption = "",
    sampler: SamplerOption = "",
    width: WidthOption = None,
    height: HeightOption = None,
    out: SheetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    opening: Any = None,
) -> None:
    """Find the LoRAs that a prompt asks for in a library, and draw it without and with them."""
    from mole_diffusers.retrieval.composing import composed, report

    if "<lora:" in prompt:
        raise ValueError("the library chooses the LoRAs; leave <lora:...> tags out of the prompt")
    seeds = row_seeds(seed, rows)
    path = target(out, "grid.png", overwrite=overwrite)
    pipe = pipeline(base, device, opening=opening)
    found_in = open_library(library, pipe, encoder)
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "sampler": sampler, "seeds": seeds}
    call = call_options(pipe, base, **how, width=width, height=height)
    pictures = {"base": drawn(pipe, prompt, negative, seeds, call)}
    with composed(found_in, pipe, prompt, mode=mode, k=k, threshold=threshold, gates=gates) as composition:
        pictures[f"found ({mode})"] = drawn(pipe, prompt, negative, seeds, call)
    found, weights = composition.found[0], composition.sets[0]
    about: dict[str, Any] = {
        "prompt": prompt,
        "negative": negative,
        "found": report(found_in, found),
        "weights": weights,
        "mode": mode,
    }
    about |= {"gates": gates, "base": base, "seeds": seeds, "sampler": sampler, **call}
    write_sheet(pictures, seeds, path, about)
    if as_json:
        print(json.dumps({"out": str(path), **about}))
        return
    shares = ", ".join(f"{name} x {weight:.3g}" for name, weight in weights.items()) or "the base alone"
    print(f"{in_words(found, found_in)}\ndrawn with {shares}, {mode}: {path}")
