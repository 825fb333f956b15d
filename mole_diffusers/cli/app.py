"""`mole app`: the app, on this machine alone unless --host says otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from mole_diffusers.cli.common import (
    WORLD,
    BaseOption,
    DeviceOption,
    LorasOption,
    TrainedOption,
    VerboseOption,
    first_recipe,
    open_studio,
    opens_base,
)


@opens_base
def app(
    base: BaseOption = WORLD,
    loras: LorasOption = None,
    trained: TrainedOption = None,
    keep: Annotated[Path, Option(metavar="FOLDER", help="Gates that the app trains are kept here.")] = Path("mole_gates"),
    gallery: Annotated[Path, Option(metavar="FOLDER", help="Pictures are kept here, each with its recipe inside.")] = Path(
        "mole_pictures"
    ),
    host: Annotated[str, Option(help="0.0.0.0 shows the app to your network. There is no password.")] = "127.0.0.1",
    port: Annotated[int, Option(help="The app is at http://HOST:PORT.")] = 7860,
    site: Annotated[
        str | None, Option(metavar="NAME", help="The name under which a server in front shows the app: studio.example.")
    ] = None,
    mcp: Annotated[bool, Option("--mcp", help="Also serve the actions as MCP tools, at /gradio_api/mcp/.")] = False,
    device: DeviceOption = None,
    verbose: VerboseOption = False,
    opening: Any = None,
) -> None:
    """Open the app in the browser: compose, see which LoRA acts where, train gates, keep recipes."""
    try:
        from mole_diffusers.app.build import build, launch

        if mcp:
            import mcp as _  # noqa: F401
    except ImportError as error:
        extra = "mcp" if error.name == "mcp" else "app"
        raise ValueError(f"this needs {error.name}: pip install 'mole-diffusers[{extra}]'") from error
    from mole_diffusers.app.actions import Actions
    from mole_diffusers.studio.catalog import folder_gates

    studio = open_studio(base, device, loras=loras, trained=trained, opening=opening)
    if not hasattr(studio.pipe, "unet"):
        what = "pictures can be drawn and gates trained; what the See page shows is read from a UNet"
        print(f"note: {type(studio.pipe).__name__} has a transformer: {what}", file=sys.stderr)
    studio.pipe.set_progress_bar_config(disable=True)  # the page shows how far a picture is
    for name, folder in folder_gates(keep).items():
        studio.catalog.add_gates(name, folder)
    if base == WORLD:
        recipe = first_recipe(
            studio, prompt="noto drawing of a sunflower and a doughnut <lora:sunflower:1> <lora:doughnut:1>"
        )
    else:
        recipe = first_recipe(studio)
    actions = Actions(studio, home=keep, gallery=gallery, thumbnail=world_thumbnails() if base == WORLD else None)
    sites = [site] if site else []
    launch(build(actions, recipe), gallery=gallery, sites=sites, server_name=host, server_port=port, mcp_server=mcp)


def world_thumbnails() -> Any:
    """Name of a LoRA of the embedded world -> the artist's drawing of its subject, or of a bear in its style."""
    from mole_diffusers import emoji

    drawings = emoji.Drawings(emoji.default_folder())

    def thumbnail(name: str) -> Any:
        if name in emoji.HELD_OUT_SUBJECTS:
            return drawings.picture(emoji.Scene((name,), "noto", "white"))
        return drawings.picture(emoji.Scene(("bear",), name, "white")) if name in emoji.HELD_OUT_STYLES else None

    return thumbnail
