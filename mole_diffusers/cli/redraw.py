"""`mole redraw`: a picture once more, from the recipe that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mole_diffusers.cli.common import (
    NONE,
    WORLD,
    BaseOption,
    DeviceOption,
    JsonOption,
    LorasOption,
    TagExpertOption,
    TrainedOption,
    VerboseOption,
    open_studio,
)
from mole_diffusers.cli.draw import draw_recipe


def redraw(
    picture: Annotated[Path, Argument(help="A PNG of mole draw, the app or A1111, or a recipe as a .json file.")],
    loras: LorasOption = None,
    expert: TagExpertOption = NONE,
    trained: TrainedOption = None,
    base: BaseOption = WORLD,
    device: DeviceOption = None,
    out: Annotated[Path, Option(metavar="PNG", help="Where the picture goes.")] = Path("redrawn.png"),
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Draw a picture again from its recipe. On the same machine its pixels are the same.

    LoRAs are found by their hash, whatever their files are called here.
    """
    from mole_diffusers.studio import infotext

    recipe = infotext.read_any(picture)
    if recipe.base not in ("", base):
        raise ValueError(f"{picture.name} was drawn with the base {recipe.base!r}; give it as --base")
    studio = open_studio(base, device, loras=loras, trained=trained, experts=expert)
    draw_recipe(studio, recipe, out, as_json=as_json)
