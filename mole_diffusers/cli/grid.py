"""`mole grid`: one picture changed along two axes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mole_diffusers.cli.common import (
    WORLD,
    BaseOption,
    DeviceOption,
    GuidanceOption,
    LorasOption,
    NamedGatesOption,
    SeedOption,
    StepsOption,
    TrainedOption,
    VerboseOption,
    first_recipe,
    open_studio,
)


def grid(
    prompt: Annotated[str, Argument(help="What to draw, with a <lora:NAME:STRENGTH> tag for each LoRA.")],
    x: Annotated[
        str, Option("--x", metavar="AXIS", help="What changes from left to right: 'weight fox=0,0.5,1', 'seed=1,2', ...")
    ] = "arm=base,sum,gates",
    y: Annotated[str, Option("--y", metavar="AXIS", help="What changes from top to bottom.")] = "seed=0,1,2",
    loras: LorasOption = None,
    gates: NamedGatesOption = "auto",
    trained: TrainedOption = None,
    base: BaseOption = WORLD,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 3.0,
    out: Annotated[Path, Option(metavar="PNG", help="Where the grid goes.")] = Path("grid.png"),
    verbose: VerboseOption = False,
) -> None:
    """Draw a grid of one picture, changed along two axes: weight NAME, seed, arm, gates, steps, guidance or sampler."""
    from tqdm import tqdm

    from mole_diffusers.studio.xy_grid import cells, parse_axis, sheet

    across, down = parse_axis(x), parse_axis(y)
    studio = open_studio(base, device, loras=loras, trained=trained)
    first = first_recipe(studio, prompt=prompt, gates=gates, seed=seed, steps=steps, guidance=guidance)
    rows = cells(studio.complete(first), across, down)
    with tqdm(total=len(rows) * len(rows[0]), desc="pictures", delay=2, leave=False) as bar:
        pictures = []
        for row in rows:
            drawn = []
            for cell in row:
                drawn.append(studio.draw(studio.complete(cell)))
                bar.update()
            pictures.append(drawn)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, across, down).save(out)
    print(f"{len(rows)} x {len(rows[0])} pictures: {out}")
