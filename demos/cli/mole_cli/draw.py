"""`mole draw`, `redraw` and `grid`: pictures from a recipe. The prompt names LoRAs by <lora:...> tags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mole_app.studio.names import WORLD, matching_lora
from mole_cli import options
from mole_cli.common import (
    check_base,
    completed,
    first_recipe,
    lora_files,
    named_values,
    open_catalog,
    opened,
    target,
)
from mole_cli.console import note, show

if TYPE_CHECKING:
    from mole_app.studio.recipe import Recipe
    from mole_app.studio.render import Studio

SETTINGS = (  # options that are settings of a recipe
    *options.DRAWING, "gates", "seed", "binding", "detail", "clip_skip",
    "strength", "hires", "hires_strength", "upscaler",
    "controlnet", "control_strength", "control_end", "ip_adapter", "ip_scale",
)  # fmt: skip


def draw(
    prompt: Annotated[
        str,
        Argument(
            help="what to draw, with a <lora:NAME:STRENGTH> tag for each LoRA; (fox:1.3), \\[fox] and BREAK work as "
            "in A1111."
        ),
    ],
    explain: Annotated[
        bool, Option("--explain", help="draw nothing, and say which LoRA would act on which words, where, and why.")
    ] = False,
    loras: options.Loras = None,
    embeddings: options.Embeddings = None,
    upscalers: options.Upscalers = None,
    controlnets: options.Controlnets = None,
    ip_adapters: options.IpAdapters = None,
    image_encoders: options.ImageEncoders = None,
    trained: options.Trained = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    compiled: options.Compiled = False,
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    slicing: options.Slicing = None,
    tiling: options.Tiling = None,
    base: options.Base = "emoji",
    expert: options.MoreExperts = [],
    image: options.Image = None,
    mask: options.Mask = None,
    control: options.Control = None,
    reference: options.Reference = None,
    controlnet: options.Controlnet = None,
    control_strength: options.ControlStrength = None,
    control_end: options.ControlEnd = None,
    ip_adapter: options.IpAdapter = None,
    ip_scale: options.IpScale = None,
    strength: options.Strength = None,
    hires: options.Hires = None,
    hires_strength: options.HiresStrength = None,
    upscaler: options.Upscaler = None,
    negative: options.Negative = None,
    prompt_2: options.Prompt2 = None,
    negative_2: options.Negative2 = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    width: options.Width = None,
    height: options.Height = None,
    sampler: options.Sampler = None,
    preset: options.Preset = None,
    style: options.Style = [],
    styles: options.Styles = None,
    seed: options.RecipeSeed = None,
    gates: options.Gates = None,
    binding: options.Binding = None,
    detail: options.Detail = None,
    clip_skip: options.ClipSkip = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw one picture of a prompt with <lora:...> tags. The PNG holds its recipe, for mole redraw and other tools."""
    given = dict(locals())
    _check_settings(given)
    if explain:
        if out is not None or overwrite:
            raise ValueError("--explain draws nothing: leave out --out and --overwrite")
        studio, asked, pictures = open_recipe(given)
        recipe = completed(studio, asked, pictures.get("image"))
        table = str(studio.explain(recipe))
        show({"explanation": table, **recipe.to_dict()}, table, as_json=as_json)
    else:
        path = target(out, "picture.png", overwrite=overwrite)
        draw_recipe(*open_recipe(given), path, as_json=as_json)


def redraw(
    picture: Annotated[
        Path,
        Argument(exists=True, dir_okay=False, help="a PNG of mole draw, the app or A1111, or a recipe as a .json file."),
    ],
    loras: options.Loras = None,
    embeddings: options.Embeddings = None,
    upscalers: options.Upscalers = None,
    controlnets: options.Controlnets = None,
    ip_adapters: options.IpAdapters = None,
    image_encoders: options.ImageEncoders = None,
    trained: options.Trained = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    compiled: options.Compiled = False,
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    slicing: options.Slicing = None,
    tiling: options.Tiling = None,
    base: options.Base = "emoji",
    expert: options.MoreExperts = [],
    image: options.Image = None,
    mask: options.Mask = None,
    control: options.Control = None,
    reference: options.Reference = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw a picture again from its recipe. On the same machine its pixels are the same.

    LoRAs are found by their hash, whatever their files are called here. If the picture was drawn over another one, pass
    that as --image. A picture of A1111 does not say which one that was.
    """
    given = dict(locals())
    from mole_diffusers.safe_files import printable

    check_base(base)
    from mole_app.studio import infotext
    from mole_app.studio.model_folders import find_base
    from mole_app.studio.names import model_name
    from mole_app.studio.picture_passes import with_pictures

    path = target(out, "redrawn.png", overwrite=overwrite)
    found, pictures = infotext.contents(picture), open_pictures(given)
    if found.axes:
        x, y = found.axes
        raise ValueError(f"{picture.name} is a grid, not a picture; mole grid PROMPT --x {x!r} --y {y!r} draws one like it")
    recipe = found.recipe if found.recipe.base else with_pictures(found.recipe, **pictures)
    here = base if base == WORLD else str(find_base(base))
    for each in found.notes(here):
        note(printable(each))
    if recipe.base and Path(recipe.base).name != Path(here).name:
        raise ValueError(f"{picture.name} was drawn with the base {model_name(recipe.base)!r}; give it as --base")
    draw_recipe(open_studio(given), recipe, pictures, path, as_json=as_json)


def grid(
    prompt: Annotated[str, Argument(help="what to draw, with a <lora:NAME:STRENGTH> tag for each LoRA.")],
    x: Annotated[
        str, Option(metavar="AXIS", help="what changes from left to right: 'weight fox=0,0.5,1', 'seed=1,2', ...")
    ] = "arm=base,sum,gates",
    y: Annotated[str, Option(metavar="AXIS", help="what changes from top to bottom.")] = "seed=0,1,2",
    loras: options.Loras = None,
    embeddings: options.Embeddings = None,
    upscalers: options.Upscalers = None,
    controlnets: options.Controlnets = None,
    ip_adapters: options.IpAdapters = None,
    image_encoders: options.ImageEncoders = None,
    trained: options.Trained = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    compiled: options.Compiled = False,
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    slicing: options.Slicing = None,
    tiling: options.Tiling = None,
    base: options.Base = "emoji",
    expert: options.MoreExperts = [],
    image: options.Image = None,
    mask: options.Mask = None,
    control: options.Control = None,
    reference: options.Reference = None,
    controlnet: options.Controlnet = None,
    control_strength: options.ControlStrength = None,
    control_end: options.ControlEnd = None,
    ip_adapter: options.IpAdapter = None,
    ip_scale: options.IpScale = None,
    strength: options.Strength = None,
    hires: options.Hires = None,
    hires_strength: options.HiresStrength = None,
    upscaler: options.Upscaler = None,
    negative: options.Negative = None,
    prompt_2: options.Prompt2 = None,
    negative_2: options.Negative2 = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    width: options.Width = None,
    height: options.Height = None,
    sampler: options.Sampler = None,
    preset: options.Preset = None,
    style: options.Style = [],
    styles: options.Styles = None,
    seed: options.RecipeSeed = None,
    gates: options.Gates = None,
    binding: options.Binding = None,
    detail: options.Detail = None,
    clip_skip: options.ClipSkip = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw a grid of pictures that changes along two axes. If it is interrupted, the cells that are left are grey.

    An axis is one of weight NAME, seed, arm, gates, binding, steps, guidance, sampler, clip_skip, hires, hires_strength or
    detail; with --image also strength, with --controlnet control_strength or control_end, with --ip-adapter ip_scale. The
    PNG holds the recipe and both axes.
    """
    given = dict(locals())
    from tqdm import tqdm

    from mole_app.studio import infotext
    from mole_app.studio.xy_grid import cells, parse_axis, sheet

    across, down = parse_axis(x), parse_axis(y)
    for axis, text in ((across, x), (down, y)):
        if given.get(axis.varies) is not None:
            flag = axis.varies.replace("_", "-")
            raise ValueError(f"the axis {text!r} varies what --{flag} gives: leave it out, or vary something else")
    _check_settings(given, is_larger="hires" in (across.varies, down.varies))
    path = target(out, "grid.png", overwrite=overwrite)
    studio, asked, pictures = open_recipe(given)
    first = completed(studio, asked, pictures.get("image"))
    wanted = [studio.complete(cell) for cell in cells(first, across, down)]
    for cell in wanted:
        studio.total_steps(cell)  # raise errors before anything is drawn
    drawn, axes = [], {"x": x, "y": y}
    try:
        for cell in tqdm(wanted, desc="pictures", delay=2, leave=False):
            drawn.append(studio.draw(cell, **pictures))
    finally:
        if drawn:
            infotext.save(sheet(drawn, across.labels, down.labels), path, first, axes)
        if len(drawn) < len(wanted):
            note(f"{len(drawn)} of {len(wanted)} pictures were drawn" + (f": {path}" if drawn else ""))
    words = f"{len(down.labels)} x {len(across.labels)} pictures: {path}"
    show({"out": str(path), **axes, **first.to_dict()}, words, as_json=as_json)


def _check_settings(asked: Mapping[str, Any], *, is_larger: bool = False) -> None:
    """Raises for a file that is missing, and for settings of what is not asked for; `is_larger`: some pictures are, by an
    axis."""
    check_base(asked["base"])
    lora_files(named_values(asked["expert"], "--expert"))
    if asked["styles"] is not None and not asked["style"]:
        raise ValueError("--styles is the file that styles are read from: give --style NAME")
    if asked["strength"] is not None and asked["image"] is None:
        raise ValueError("--strength says how much of a picture is redrawn: give --image")
    if asked["hires_strength"] is not None and asked["hires"] in (None, 1) and not is_larger:
        raise ValueError("--hires-strength says how much of the enlarged picture is redrawn: give --hires")
    needed = {"controlnet": "control", "control_strength": "control", "control_end": "control", "control": "controlnet"}
    needed |= {"ip_adapter": "reference", "ip_scale": "reference", "reference": "ip_adapter"}
    for name, other in needed.items():
        if asked[name] is not None and asked[other] is None:
            raise ValueError(f"--{name} goes with --{other}: give that as well".replace("_", "-"))


def open_recipe(given: Mapping[str, Any]) -> tuple[Studio, Recipe, dict[str, Any]]:
    """The studio, the recipe from the options, and the pictures to draw over."""
    from mole_app.studio.picture_passes import with_pictures
    from mole_app.studio.prompt_syntax import parse
    from mole_app.studio.styles import preset, read_styles, styled
    from mole_diffusers.binding import AUTO
    from mole_diffusers.gates import GATE_CONFIG

    pictures = open_pictures(given)
    studio = open_studio(given)
    asked = {name: given[name] for name in SETTINGS}
    file, names, styles = given["preset"], given["style"], given["styles"]
    like = {} if file is None else preset(file)
    asked |= {name: value for name, value in like.items() if asked[name] is None}
    folder = Path(gates := asked["gates"] or AUTO)
    if gates not in studio.catalog.gates and (folder / GATE_CONFIG).is_file():  # it has no name yet
        asked["gates"] = folder.resolve().name
        studio.catalog.add_gates(asked["gates"], folder)
    recipe = first_recipe(studio, prompt=given["prompt"], **asked)
    recipe = styled(recipe, names, read_styles(styles or "styles.csv")) if names else recipe
    tags, experts = parse(recipe.prompt, studio.catalog.loras).tags, named_values(given["expert"], "--expert")
    if unnamed := sorted(experts.keys() - {matching_lora(tag.name, experts) for tag in tags}):
        raise ValueError(f"no tag of the prompt names {unnamed[0]!r}, which would do nothing: add <lora:{unnamed[0]}:1>")
    settings_of_loras = [f"--{name}" for name in ("gates", "binding") if given[name] is not None]
    if settings_of_loras and not tags:
        raise ValueError(f"{' and '.join(settings_of_loras)} would do nothing: the prompt has no <lora:NAME:1> tag")
    return studio, with_pictures(recipe, **pictures), pictures


def open_studio(given: Mapping[str, Any]) -> Studio:
    """The pipeline of --base, with the LoRAs of --loras and --expert and the gates of --trained in its catalog."""
    from mole_app.studio.render import Studio

    catalog = open_catalog([given["base"]], given, given["expert"])
    found = opened(given["base"], given, says=True)
    return Studio(found.pipe, catalog, found.name, found.config)


def open_pictures(given: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures of --image, --mask, --control and --reference, by these names.

    Raises ValueError for a file that is not a picture, and for --mask without --image.
    """
    from mole_app.studio.recipe import PICTURES
    from mole_diffusers.safe_files import read_picture

    if given["mask"] is not None and given["image"] is None:
        raise ValueError("--mask shows a part of a picture: give --image")
    paths = {name: given[name] for name in PICTURES}
    return {name: read_picture(path, f"--{name} {path}") for name, path in paths.items() if path is not None}


def draw_recipe(studio: Studio, asked: Recipe, pictures: Mapping[str, Any], path: Path, *, as_json: bool) -> None:
    """Draw a recipe, write a PNG that holds it, and say what was drawn: seed, size, what each LoRA did, and the file."""
    from mole_app.studio import infotext
    from mole_app.studio.picture_notes import PictureNotes

    recipe, noted = completed(studio, asked, pictures.get("image")), PictureNotes()
    image = studio.draw(recipe, **pictures, noted=noted)
    infotext.save(image, path, recipe)
    for each in noted.warnings:
        note(each)
    did = noted.of_loras(recipe, studio.explain(recipe)) if recipe.arm == "gates" else {}
    size = f"{image.width} x {image.height} pixels"
    said = [
        f"{recipe.plain_text}: seed {recipe.seed}, {size}",
        *(f"{name} {words}" for name, words in did.items()),
        str(path),
    ]
    show({"out": str(path), "loras": did, **recipe.to_dict()}, "\n".join(said), as_json=as_json)
