"""`mole draw`: one picture of a prompt with <lora:...> tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from mole_diffusers.cli.common import (
    NONE,
    WORLD,
    BaseOption,
    DeviceOption,
    GuidanceOption,
    JsonOption,
    LorasOption,
    NamedGatesOption,
    SeedOption,
    StepsOption,
    TagExpertOption,
    TrainedOption,
    VerboseOption,
    first_recipe,
    open_studio,
)

if TYPE_CHECKING:
    from mole_diffusers.studio.recipe import Recipe
    from mole_diffusers.studio.render import Studio


def draw(
    prompt: Annotated[str, Argument(help="What to draw, with a <lora:NAME:STRENGTH> tag for each LoRA.")],
    loras: LorasOption = None,
    expert: TagExpertOption = NONE,
    gates: NamedGatesOption = "auto",
    trained: TrainedOption = None,
    base: BaseOption = WORLD,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 3.0,
    out: Annotated[Path, Option(metavar="PNG", help="Where the picture goes.")] = Path("picture.png"),
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Draw one picture of a prompt with <lora:...> tags. The PNG holds its recipe, for mole redraw and other tools."""
    studio = open_studio(base, device, loras=loras, trained=trained, experts=expert)
    recipe = first_recipe(studio, prompt=prompt, gates=gates, seed=seed, steps=steps, guidance=guidance)
    draw_recipe(studio, recipe, out, as_json=as_json)


def draw_recipe(studio: Studio, recipe: Recipe, out: Path, *, as_json: bool) -> None:
    """Draw a recipe, write a PNG that holds it, and say so."""
    from mole_diffusers.studio import infotext

    recipe = studio.complete(recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    infotext.save(studio.draw(recipe), out, recipe)
    print(json.dumps({"out": str(out), **recipe.to_dict()}) if as_json else f"{recipe.prompt}: {out}")
