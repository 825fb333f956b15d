"""`mole redraw`: a picture once more, from the recipe that it holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from mole_diffusers.cli.common import (
    NONE,
    WORLD,
    BaseOption,
    DeviceOption,
    JsonOption,
    LorasOption,
    OverwriteOption,
    TagExpertOption,
    TrainedOption,
    VerboseOption,
    open_studio,
    opens_base,
    target,
)
from mole_diffusers.cli.draw import ImageOption, MaskOption, draw_recipe, open_pictures


@opens_base
def redraw(
    picture: Annotated[Path, Argument(help="A PNG of mole draw, the app or A1111, or a recipe as a .json file.")],
    loras: LorasOption = None,
    expert: TagExpertOption = NONE,
    trained: TrainedOption = None,
    base: BaseOption = WORLD,
    device: DeviceOption = None,
    image: ImageOption = None,
    mask: MaskOption = None,
    out: Annotated[
        Path | None, Option(metavar="PNG", help="Where the picture goes. Default: a new redrawn.png, redrawn-2.png, ...")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    opening: Any = None,
) -> None:
    """Draw a picture again from its recipe. On the same machine its pixels are the same.

    LoRAs are found by their hash, whatever their files are called here. A picture that was drawn over another needs that one
    as --image.
    """
    from mole_diffusers.lora.safe_files import printable
    from mole_diffusers.studio import infotext
    from mole_diffusers.studio.base_models import find_base

    path = target(out, "redrawn.png", overwrite=overwrite)
    recipe = infotext.read_any(picture)
    if lacking := infotext.left_out(picture):
        print(f"note: {printable(lacking)}", file=sys.stderr)
    given = base if base == WORLD else str(find_base(base))
    if recipe.base and Path(recipe.base).name != Path(given).name:
        raise ValueError(f"{picture.name} was drawn with the base {recipe.base!r}; give it as --base")
    pictures = open_pictures(image, mask)
    studio = open_studio(base, device, loras=loras, trained=trained, experts=expert, opening=opening)
    draw_recipe(studio, recipe, path, pictures, as_json=as_json)
