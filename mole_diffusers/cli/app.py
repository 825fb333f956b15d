"""`mole app`: the app, on this machine alone unless --host says otherwise."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mole_diffusers.cli.studio import add_studio, default_recipe, studio


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("app", help="the app in the browser: compose, see why, train, keep")
    add_studio(command)
    command.add_argument("--keep", type=Path, default=Path("mole_gates"), help="folder of the gates that the app trains")
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0 shows it to the network; there is no password")
    command.add_argument("--port", type=int, default=7860)
    command.add_argument("--mcp", action="store_true", help="also serve the endpoints as MCP tools, at /gradio_api/mcp/")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve the app until it is interrupted."""
    try:
        from mole_diffusers.app.build import build, launch

        if args.mcp:
            import mcp  # noqa: F401
    except ImportError as error:
        extra = "mcp" if error.name == "mcp" else "app"
        raise ValueError(f"this needs {error.name}: pip install 'mole-diffusers[{extra}]'") from error
    from mole_diffusers.app.actions import Actions
    from mole_diffusers.studio.catalog import folder_gates

    place = studio(args)
    for name, folder in folder_gates(args.keep).items():
        place.catalog.add_gates(name, folder)
    actions = Actions(place, home=args.keep, thumbnail=world_thumbnails() if args.base == "emoji" else None)
    where: dict[str, Any] = {"server_name": args.host, "server_port": args.port, "mcp_server": args.mcp}
    launch(build(actions, default_recipe(place)), **where)
    return 0


def world_thumbnails() -> Any:
    """Name of a LoRA of the embedded world -> the artist's drawing of its subject, or of a bear in its style."""
    from mole_diffusers import emoji

    drawings = emoji.Drawings(emoji.default_folder())

    def thumbnail(name: str) -> Any:
        if name in emoji.HELD_OUT_SUBJECTS:
            return drawings.picture(emoji.Scene((name,), "noto", "white"))
        return drawings.picture(emoji.Scene(("bear",), name, "white")) if name in emoji.HELD_OUT_STYLES else None

    return thumbnail
