"""`mole draw`: one picture of a prompt with <lora:...> tags."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import first_recipe, open_studio, target

if TYPE_CHECKING:
    from PIL import Image

    from mole_diffusers.studio.recipe import Recipe
    from mole_diffusers.studio.render import Studio

OVER = "Drawing over a picture"
ImageOption = Annotated[
    Path | None, Option(metavar="PICTURE", help="A picture to draw over (img2img).", rich_help_panel=OVER)
]
MaskOption = Annotated[
    Path | None,
    Option(metavar="PICTURE", help="White where --image is drawn over (inpainting).", rich_help_panel=OVER),
]
PngOption = Annotated[
    Path | None, Option(metavar="PNG", help="Where the picture goes. Default: a new picture.png, picture-2.png, ...")
]


@options.takes(files=options.Studio, how=options.Drawing, opening=options.Opening)
def draw(
    prompt: Annotated[
        str,
        Argument(
            help="What to draw, with a <lora:NAME:STRENGTH> tag for each LoRA; (fox:1.3), [fox] and BREAK as in A1111."
        ),
    ],
    gates: options.NamedGates = "auto",
    seed: options.Seed = 0,
    image: ImageOption = None,
    mask: MaskOption = None,
    strength: Annotated[float, Option(min=0, max=1, help="How much of --image is drawn anew.", rich_help_panel=OVER)] = 0.6,
    hires: Annotated[
        float,
        Option(min=1, max=4, help="Make the picture so much larger and draw over it once more.", rich_help_panel=OVER),
    ] = 1.0,
    hires_strength: Annotated[
        float, Option(min=0, max=1, help="How much of it is drawn anew then.", rich_help_panel=OVER)
    ] = 0.5,
    out: PngOption = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    files: options.Given,
    how: options.Given,
    opening: options.Given,
) -> None:
    """Draw one picture of a prompt with <lora:...> tags. The PNG holds its recipe, for mole redraw and other tools."""
    from mole_diffusers.studio.render import with_pictures

    path = target(out, "picture.png", overwrite=overwrite)
    pictures = open_pictures(image, mask)
    studio = open_studio(files, opening)
    settings = {**how, "seed": seed, "strength": strength, "hires": hires, "hires_strength": hires_strength}
    recipe = first_recipe(studio, prompt=prompt, gates=gates, **settings)
    draw_recipe(studio, with_pictures(recipe, **pictures), path, pictures, as_json=as_json)


def open_pictures(image: Path | None, mask: Path | None) -> dict[str, Image.Image]:
    """The pictures of --image and --mask. Raises ValueError for a file that is no picture, and a mask alone."""
    from mole_diffusers.studio.picture_passes import read_picture

    if mask is not None and image is None:
        raise ValueError("--mask shows a part of a picture: give --image")
    given = (("image", image), ("mask", mask))
    return {name: read_picture(path, f"--{name} {path}") for name, path in given if path is not None}


def draw_recipe(studio: Studio, asked: Recipe, path: Path, pictures: Mapping[str, Image.Image], *, as_json: bool) -> None:
    """Draw a recipe, write a PNG that holds it, and say so."""
    from mole_diffusers.studio import infotext

    recipe = studio.complete(asked)
    for note in studio.notes(asked, recipe, pictures.get("image")):
        print(f"note: {note}", file=sys.stderr)
    infotext.save(studio.draw(recipe, image=pictures.get("image"), mask=pictures.get("mask")), path, recipe)
    said = f"{recipe.prompt}: {path}" if asked.seed == recipe.seed else f"{recipe.prompt}, seed {recipe.seed}: {path}"
    print(json.dumps({"out": str(path), **recipe.to_dict()}) if as_json else said)
