"""`mole app`: the web app, visible only on this machine unless --host says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_app.studio.names import WORLD
from mole_cli import options
from mole_cli.common import check_base, first_recipe, open_catalog, opened
from mole_cli.console import note

if TYPE_CHECKING:
    from mole_app.studio.base_models import Base


def app(
    base: Sequence[str] = (WORLD,),
    keep: Path = Path("mole_gates"),
    gallery: Path = Path("mole_pictures"),
    host: str = "127.0.0.1",
    port: int = 7860,
    site: str | None = None,
    mcp: bool = False,
    *,
    files: options.Files,
    opening: options.Opening,
) -> None:
    """Start the app for your browser: compose, see which LoRA acts where, train gates, keep recipes.

    Args:
        base (MODEL): as in the other commands. The app starts with the first one, and you can switch between all. A
            models folder of A1111, Forge or ComfyUI stands for every model in it.
        keep (FOLDER): gates that you train in the app are kept here.
        gallery (FOLDER): pictures are kept here, each with its recipe inside.
        host: 0.0.0.0 shows the app to your network. There is no password.
        port: the app is at http://HOST:PORT.
        site (NAME): the name under which a server in front of the app shows it: studio.example.
        mcp: also serve the actions as MCP tools, at /gradio_api/mcp/.
    """
    for each in base:
        check_base(each)
    try:
        from mole_app.web.build import build, launch

        if mcp:
            import mcp as _  # noqa: F401
    except ImportError as error:
        extra = "mcp" if error.name == "mcp" else "app"
        raise ValueError(f"this needs {error.name}: pip install 'mole-diffusers[{extra}]'") from error
    from mole_app.studio.catalog import folder_gates
    from mole_app.studio.model_folders import bases_of
    from mole_app.studio.render import Studio
    from mole_app.web.actions import Actions
    from mole_diffusers.training import unet_of

    def open_one(name: str) -> Base:
        found = opened(name, opening, says=True)
        found.pipe.set_progress_bar_config(disable=True)  # the page has its own progress bar
        try:
            unet_of(found.pipe, "training on this page")
        except ValueError as error:
            note(f"pictures can be drawn, but {error}")
        return found

    bases = bases_of(base)
    if opening.base_config and len(bases) > 1:
        raise ValueError(f"--base-config is the config of one model, and these are {len(bases)}: {', '.join(bases)}")
    catalog = open_catalog(bases.values(), files)
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
