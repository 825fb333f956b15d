"""`mole draw`: one picture of a prompt with <lora:...> tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import completed, first_recipe, open_pictures, open_studio, target

if TYPE_CHECKING:
    from mole_diffusers.studio.recipe import Recipe
    from mole_diffusers.studio.render import Studio

PngOption = Annotated[
    Path | None, Option(metavar="PNG", help="Where the picture goes. Default: a new picture.png, picture-2.png, ...")
]


@options.takes(files=options.Studio, given=options.Pictures, over=options.Over, how=options.Drawing, opening=options.Opening)
def draw(
    prompt: Annotated[
        str,
        Argument(
            help="What to draw, with a <lora:NAME:STRENGTH> tag for each LoRA; (fox:1.3), [fox] and BREAK as in A1111."
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
    out: PngOption = None,
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
    recipe = first_recipe(studio, prompt=prompt, gates=gates, seed=seed, binding=binding, **how, **over)
    draw_recipe(studio, with_pictures(recipe, **pictures), path, pictures, as_json=as_json)


def draw_recipe(studio: Studio, asked: Recipe, path: Path, pictures: Mapping[str, Any], *, as_json: bool) -> None:
    """Draw a recipe, write a PNG that holds it, and say so."""
    from mole_diffusers.studio import infotext

    recipe = completed(studio, asked, pictures)
    infotext.save(studio.draw(recipe, **pictures), path, recipe)
    said = f"{recipe.prompt}: {path}" if asked.seed == recipe.seed else f"{recipe.prompt}, seed {recipe.seed}: {path}"
    print(json.dumps({"out": str(path), **recipe.to_dict()}) if as_json else said)
