"""The command `mole`: its subcommands, its help and its exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mole_cli.app import app
from mole_cli.commands import as_command, help_of
from mole_cli.compose import compose
from mole_cli.draw import draw, grid, redraw
from mole_cli.evaluate import evaluate
from mole_cli.inspect import inspect
from mole_cli.library import compose_library, index, retrieve
from mole_cli.merge import merge
from mole_cli.train import train, train_lora
from mole_diffusers import __version__

COMMANDS = {
    "Make pictures": (compose, draw, redraw, grid, app),
    "Train": (train, train_lora),
    "Work with LoRA files": (inspect, merge, index, retrieve, compose_library),
    "Measure": (evaluate,),
}


def show_version(asked: bool) -> None:
    if asked:
        print(f"mole {__version__}")
        raise typer.Exit


def mole(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Compose several concept LoRAs in one picture. For the help of one command: mole COMMAND --help."""


def parser(only: str | None = None) -> Any:
    """All commands as one typer command, which takes 50 ms, or `only` the one of this name; all if there is none."""
    listed = [(panel, command) for panel, commands in COMMANDS.items() for command in commands]
    named = {command.__name__.replace("_", "-"): (panel, command) for panel, command in listed}
    whole = typer.Typer()
    whole.callback()(mole)
    for name in [only] if only in named else named:
        panel, command = named[name]
        whole.command(name, help=help_of(command), rich_help_panel=panel)(as_command(command))
    return typer.main.get_command(whole)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 with one line on stderr for bad input."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        return parser(words[0]).main(words, prog_name="mole", standalone_mode=False) or 0
    except (typer.TyperException, ValueError, OSError) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if isinstance(error, OSError) and error.filename is not None:
            there_is_none = isinstance(error, FileNotFoundError)
            text = f"there is no file {error.filename}" if there_is_none else f"{error.filename}: {error.strerror}"
        name = f"mole {words[0]}" if words and not words[0].startswith("-") else "mole"
        print(f"{name}: {text}", file=sys.stderr)
        return 1
