"""`mole grid`: one picture changed along two axes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import completed, first_recipe, open_pictures, open_studio, target


@options.takes(files=options.Studio, given=options.Pictures, over=options.Over, how=options.Drawing, opening=options.Opening)
def grid(
    prompt: Annotated[str, Argument(help="What to draw, with a <lora:NAME:STRENGTH> tag for each LoRA.")],
    x: Annotated[
        str, Option("--x", metavar="AXIS", help="What changes from left to right: 'weight fox=0,0.5,1', 'seed=1,2', ...")
    ] = "arm=base,sum,gates",
    y: Annotated[str, Option("--y", metavar="AXIS", help="What changes from top to bottom.")] = "seed=0,1,2",
    gates: options.NamedGates = "auto",
    seed: options.Seed = 0,
    out: Annotated[
        Path | None, Option(metavar="PNG", help="Where the grid goes. Default: a new grid.png, grid-2.png, ...")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    files: options.Given,
    given: options.Given,
    over: options.Given,
    how: options.Given,
    opening: options.Given,
) -> None:
    """Draw a grid of one picture, changed along two axes: weight NAME, seed, arm, gates, steps, guidance, sampler, hires or
    hires_strength, and with --image also strength.

    The PNG holds the recipe and both axes.
    """
    from tqdm import tqdm

    from mole_diffusers.studio import infotext
    from mole_diffusers.studio.render import with_pictures
    from mole_diffusers.studio.xy_grid import cells, parse_axis, sheet

    across, down = parse_axis(x), parse_axis(y)
    path = target(out, "grid.png", overwrite=overwrite)
    pictures = open_pictures(given)
    studio = open_studio(files, opening)
    asked = first_recipe(studio, prompt=prompt, gates=gates, seed=seed, **how, **over)
    first = completed(studio, with_pictures(asked, **pictures), pictures)
    rows = [[studio.complete(cell) for cell in row] for row in cells(first, across, down)]
    for cell in (cell for row in rows for cell in row):
        studio.total_steps(cell)  # raises before anything is drawn
    with tqdm(total=len(rows) * len(rows[0]), desc="pictures", delay=2, leave=False) as bar:
        drawn: list[list[Any]] = []
        for row in rows:
            drawn.append([])
            for cell in row:
                drawn[-1].append(studio.draw(cell, **pictures))
                bar.update()
    axes = {"x": x, "y": y}
    infotext.save(sheet(drawn, across.labels, down.labels), path, first, axes)
    facts = {"out": str(path), **axes, **first.to_dict()}
    print(json.dumps(facts) if as_json else f"{len(rows)} x {len(rows[0])} pictures: {path}")
