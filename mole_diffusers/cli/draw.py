"""`mole draw`, `redraw` and `grid`: pictures of a recipe, whose LoRAs a prompt names by <lora:...> tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import completed, first_recipe, named_gates, open_pictures, open_studio, target
from mole_diffusers.cli.console import note

if TYPE_CHECKING:
    from mole_diffusers.studio.recipe import Recipe
    from mole_diffusers.studio.render import Studio


@options.takes(files=options.Studio, given=options.Pictures, over=options.Over, how=options.Drawing, opening=options.Opening)
def draw(
    prompt: Annotated[
        str,
        Argument(
            help="What to draw, with a <lora:NAME:STRENGTH> tag for each LoRA; (fox:1.3), \\[fox] and BREAK as in A1111."
        ),
    ],
    gates: options.NamedGates = "auto",
    seed: options.Seed = 0,
    binding: Annotated[
        str,
        Option(
            metavar="HOW",
            help="bound: each LoRA on its own words and in its own place; tiles: and drawn there as a picture of its own at "
            "first, for several subjects; auto: tiles where each has room, else bound; none: all everywhere.",
        ),
    ] = "auto",
    out: Annotated[
        Path | None, Option(metavar="PNG", help="Where the picture goes. Default: a new picture.png, picture-2.png, ...")
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
    """Draw one picture of a prompt with <lora:...> tags. The PNG holds its recipe, for mole redraw and other tools."""
    from mole_diffusers.studio.render import with_pictures

    path = target(out, "picture.png", overwrite=overwrite)
    pictures = open_pictures(given)
    studio = open_studio(files, opening)
    recipe = first_recipe(studio, prompt=prompt, gates=named_gates(studio, gates), seed=seed, binding=binding, **how, **over)
    draw_recipe(studio, with_pictures(recipe, **pictures), path, pictures, as_json=as_json)


@options.takes(files=options.Studio, given=options.Pictures, opening=options.Opening)
def redraw(
    picture: Annotated[Path, Argument(help="A PNG of mole draw, the app or A1111, or a recipe as a .json file.")],
    out: Annotated[
        Path | None, Option(metavar="PNG", help="Where the picture goes. Default: a new redrawn.png, redrawn-2.png, ...")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    files: options.Given,
    given: options.Given,
    opening: options.Given,
) -> None:
    """Draw a picture again from its recipe. On the same machine its pixels are the same.

    LoRAs are found by their hash, whatever their files are called here. A picture that was drawn over another needs that one
    as --image.
    """
    from mole_diffusers.lora.safe_files import printable
    from mole_diffusers.studio import infotext
    from mole_diffusers.studio.base_models import find_base
    from mole_diffusers.studio.names import model_name

    path = target(out, "redrawn.png", overwrite=overwrite)
    found = infotext.contents(picture)
    recipe = found.recipe
    if found.left_out:
        note(printable(found.left_out))
    base = files["base"]
    here = base if base == options.WORLD else str(find_base(base))
    if recipe.base and Path(recipe.base).name != Path(here).name:
        raise ValueError(f"{picture.name} was drawn with the base {model_name(recipe.base)!r}; give it as --base")
    pictures = open_pictures(given)
    studio = open_studio(files, opening)
    draw_recipe(studio, recipe, path, pictures, as_json=as_json)


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
    """Draw a grid of one picture, changed along two axes: weight NAME, seed, arm, gates, binding, steps, guidance, sampler,
    hires or hires_strength, and with --image also strength.

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
    asked = first_recipe(studio, prompt=prompt, gates=named_gates(studio, gates), seed=seed, **how, **over)
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


def draw_recipe(studio: Studio, asked: Recipe, path: Path, pictures: Mapping[str, Any], *, as_json: bool) -> None:
    """Draw a recipe, write a PNG that holds it, and say so."""
    from mole_diffusers.studio import infotext

    recipe = completed(studio, asked, pictures)
    infotext.save(studio.draw(recipe, **pictures), path, recipe)
    said = f"{recipe.prompt}: {path}" if asked.seed == recipe.seed else f"{recipe.prompt}, seed {recipe.seed}: {path}"
    print(json.dumps({"out": str(path), **recipe.to_dict()}) if as_json else said)
