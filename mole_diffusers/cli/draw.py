"""`mole draw`: one picture of a prompt with <lora:...> tags."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mole_diffusers.cli.common import (
    NONE,
    WORLD,
    BaseOption,
    DeviceOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    LorasOption,
    NamedGatesOption,
    NegativeOption,
    OverwriteOption,
    SamplerOption,
    SeedOption,
    StepsOption,
    TagExpertOption,
    TrainedOption,
    VerboseOption,
    WidthOption,
    first_recipe,
    open_studio,
    opens_base,
    target,
)

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


@opens_base
def draw(
    prompt: Annotated[
        str,
        Argument(
            help="What to draw, with a <lora:NAME:STRENGTH> tag for each LoRA; (fox:1.3), [fox] and BREAK as in A1111."
        ),
    ],
    negative: NegativeOption = "",
    loras: LorasOption = None,
    expert: TagExpertOption = NONE,
    gates: NamedGatesOption = "auto",
    trained: TrainedOption = None,
    base: BaseOption = WORLD,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = 20,
    guidance: GuidanceOption = None,
    sampler: SamplerOption = "",
    width: WidthOption = None,
    height: HeightOption = None,
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
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    opening: Any = None,
) -> None:
    """Draw one picture of a prompt with <lora:...> tags. The PNG holds its recipe, for mole redraw and other tools."""
    from mole_diffusers.studio.render import with_pictures

    path = target(out, "picture.png", overwrite=overwrite)
    pictures = open_pictures(image, mask)
    studio = open_studio(base, device, loras=loras, trained=trained, experts=expert, opening=opening)
    settings: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance, "sampler": sampler}
    settings |= {"strength": strength, "hires": hires, "hires_strength": hires_strength}
    if "image" in pictures:  # its own size, unless another is given
        width, height = width or pictures["image"].width, height or pictures["image"].height
    recipe = first_recipe(studio, prompt=prompt, negative=negative, gates=gates, width=width, height=height, **settings)
    draw_recipe(studio, with_pictures(recipe, **pictures), path, pictures, as_json=as_json)


def open_pictures(image: Path | None, mask: Path | None) -> dict[str, Image.Image]:
    """The pictures of --image and --mask. Raises ValueError for a file that is no picture, and a mask alone."""
    from PIL import Image, UnidentifiedImageError

    if mask is not None and image is None:
        raise ValueError("--mask shows a part of a picture: give --image")
    found = {}
    for name, path in (("image", image), ("mask", mask)):
        try:
            if path is not None:
                with Image.open(path) as opened:
                    found[name] = opened.copy()
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"--{name} {path} is not a picture that can be read") from error
    return found


def draw_recipe(studio: Studio, asked: Recipe, path: Path, pictures: Mapping[str, Image.Image], *, as_json: bool) -> None:
    """Draw a recipe, write a PNG that holds it, and say so."""
    from mole_diffusers.studio import infotext

    recipe = studio.complete(asked)
    for note in studio.notes(asked, recipe):
        print(f"note: {note}", file=sys.stderr)
    infotext.save(studio.draw(recipe, image=pictures.get("image"), mask=pictures.get("mask")), path, recipe)
    said = f"{recipe.prompt}: {path}" if asked.seed == recipe.seed else f"{recipe.prompt}, seed {recipe.seed}: {path}"
    print(json.dumps({"out": str(path), **recipe.to_dict()}) if as_json else said)
