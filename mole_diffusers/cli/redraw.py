"""`mole redraw`: a picture once more, from the recipe that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import open_pictures, open_studio, target
from mole_diffusers.cli.console import note
from mole_diffusers.cli.draw import draw_recipe


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
    recipe = infotext.read_any(picture)
    if lacking := infotext.left_out(picture):
        note(printable(lacking))
    base = files["base"]
    here = base if base == options.WORLD else str(find_base(base))
    if recipe.base and Path(recipe.base).name != Path(here).name:
        raise ValueError(f"{picture.name} was drawn with the base {model_name(recipe.base)!r}; give it as --base")
    pictures = open_pictures(given)
    studio = open_studio(files, opening)
    draw_recipe(studio, recipe, path, pictures, as_json=as_json)
