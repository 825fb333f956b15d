"""`mole app`: the web app, visible only on this machine unless --host says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from mole_app.studio.names import WORLD
from mole_cli import options
from mole_cli.common import check_base, first_recipe, open_catalog, opened
from mole_cli.console import note

if TYPE_CHECKING:
    from mole_app.studio.base_models import Base


def app(
    base: Annotated[
        list[str],
        Option(
            metavar="MODEL",
            help="as in the other commands. The app starts with the first one, and you can switch between all. A models "
            "folder of A1111, Forge or ComfyUI stands for every model in it. Repeatable.",
        ),
    ] = ["emoji"],
    keep: Annotated[Path, Option(metavar="FOLDER", help="gates that you train in the app are kept here.")] = Path(
        "mole_gates"
    ),
    gallery: Annotated[Path, Option(metavar="FOLDER", help="pictures are kept here, each with its recipe inside.")] = Path(
        "mole_pictures"
    ),
    host: Annotated[str, Option(help="0.0.0.0 shows the app to your network. There is no password.")] = "127.0.0.1",
    port: Annotated[int, Option(help="the app is at http://HOST:PORT.")] = 7860,
    site: Annotated[
        str | None,
        Option(metavar="NAME", help="the name under which a server in front of the app shows it: studio.example."),
    ] = None,
    mcp: Annotated[bool, Option("--mcp", help="also serve the actions as MCP tools, at /gradio_api/mcp/.")] = False,
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
    verbose: options.Verbose = False,
) -> None:
    """Start the app for your browser: compose, see which LoRA acts where, train gates, keep recipes."""
    asked = dict(locals())
    for each in base:
        check_base(each)
    if mcp and find_spec("mcp") is None:
        raise ValueError("this needs mcp: pip install 'mole-diffusers[mcp]'")
    from mole_app.studio.catalog import folder_gates
    from mole_app.studio.model_folders import bases_of
    from mole_app.studio.render import Studio
    from mole_app.web.actions import Actions
    from mole_app.web.build import build, launch
    from mole_diffusers.training import unet_of

    def open_one(name: str) -> Base:
        found = opened(name, asked, says=True)
        found.pipe.set_progress_bar_config(disable=True)  # the page has its own progress bar
        try:
            unet_of(found.pipe, "training on this page")
        except ValueError as error:
            note(f"pictures can be drawn, but {error}")
        return found

    bases = bases_of(base)
    if base_config and len(bases) > 1:
        raise ValueError(f"--base-config is the config of one model, and these are {len(bases)}: {', '.join(bases)}")
    catalog = open_catalog(bases.values(), asked)
    for name, folder in folder_gates(keep).items():
        catalog.add_gates(name, folder)
    first = first_that_opens(list(bases.values()), open_one)
    studio = Studio(first.pipe, catalog, first.name, first.config)
    prompt = "noto drawing of a sunflower and a doughnut <lora:sunflower:1> <lora:doughnut:1>" if first.name == WORLD else ""
    recipe = first_recipe(studio, prompt=prompt, seed=-1)
    pictures = world_thumbnails() if WORLD in bases.values() else None
    actions = Actions(studio, home=keep, gallery=gallery, thumbnail=pictures, bases=bases, opening=open_one)
    sites = [site] if site else []
    launch(build(actions, recipe), gallery=gallery, sites=sites, server_name=host, server_port=port, mcp_server=mcp)


def first_that_opens(bases: Sequence[str], opening: Callable[[str], Base]) -> Base:
    """The first of these base models that can be opened, with a note for each before it: a folder may hold any files.

    Raises ValueError if none can be opened.
    """
    for name in bases[:-1]:
        try:
            return opening(name)
        except ValueError as error:
            note(str(error))
    return opening(bases[-1])


def world_thumbnails() -> Any:
    """Maps each LoRA of the emoji world to the artist's drawing of its subject, or of a bear in its style."""
    import mole_world

    drawings = mole_world.Drawings(mole_world.default_folder())

    def thumbnail(name: str) -> Any:
        if name in mole_world.words.HELD_OUT_SUBJECTS:
            return drawings.picture(mole_world.Scene((name,), "noto", "white"))
        return (
            drawings.picture(mole_world.Scene(("bear",), name, "white"))
            if name in mole_world.words.HELD_OUT_STYLES
            else None
        )

    return thumbnail
