"""The command `mole`: its subcommands, its help and its exit status. A subcommand is imported when it is called."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from inspect import getdoc
from typing import Annotated, Any, NamedTuple

import typer

from mole_diffusers import __version__


class Command(NamedTuple):
    """A subcommand: where its function is, its line in the help, and the extra of what it needs."""

    module: str
    function: str
    help: str
    extra: str = ""


COMMANDS = {
    "Make pictures": {
        "compose": Command("compose", "compose", "Draw a prompt with several LoRAs, next to their plain sum."),
        "draw": Command("draw", "draw", "Draw one picture of a prompt with <lora:...> tags."),
        "redraw": Command("draw", "redraw", "Draw a picture again from its recipe."),
        "grid": Command("draw", "grid", "Draw a grid of pictures that changes along two axes."),
        "app": Command("app", "app", "Start the app for your browser.", "app"),
    },
    "Train": {
        "train": Command("train", "train", "Train gates for a set of LoRAs: how much each one acts, where and when."),
        "train-lora": Command("train", "train_lora", "Teach a base one concept from pictures."),
    },
    "Work with LoRA files": {
        "inspect": Command("inspect", "inspect", "Show what is in LoRA files."),
        "merge": Command("merge", "merge", "Merge several LoRA files into one ordinary LoRA file, without training."),
        "index": Command("library", "index", "Index a folder of LoRAs as a library.", "library"),
        "retrieve": Command("library", "retrieve", "Show which LoRAs of a library fit a prompt, and why.", "library"),
        "compose-library": Command("library", "compose_library", "Find the LoRAs for a prompt, and draw it.", "library"),
    },
    "Measure": {
        "evaluate": Command("evaluate", "evaluate", "Compare ways to compose LoRAs on many prompts and seeds.", "evaluate"),
    },
}
NAMED = {name: command for commands in COMMANDS.values() for name, command in commands.items()}


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


def parser(*called: str) -> Any:
    """All commands as one typer command. Those of `called` are imported; of the others it has the line of the help."""
    whole = typer.Typer()
    whole.callback()(mole)
    for panel, commands in COMMANDS.items():
        for name, command in commands.items():
            function: Any = lambda: None  # noqa: E731
            text = command.help
            if name in called:
                function = getattr(import_module(f"mole_cli.{command.module}"), command.function)
                text = re.sub(r"(?<!\n)\n(?!\n)", " ", getdoc(function) or "")  # each paragraph on one line
            whole.command(name, help=text, rich_help_panel=panel)(function)
    return typer.main.get_command(whole)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 with one line on stderr for bad input."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    name = f"mole {words[0]}" if not words[0].startswith("-") else "mole"
    try:
        commands = parser(words[0], *os.environ.get("COMP_WORDS", "").split())  # these words are completed by a shell
        return commands.main(words, prog_name="mole", standalone_mode=False) or 0
    except (typer.TyperException, ValueError, OSError) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if isinstance(error, OSError) and error.filename is not None:
            there_is_none = isinstance(error, FileNotFoundError)
            text = f"there is no file {error.filename}" if there_is_none else f"{error.filename}: {error.strerror}"
    except ModuleNotFoundError as error:
        extra = NAMED[words[0]].extra if words[0] in NAMED else ""
        package = f"mole-diffusers[{extra}]" if extra else "mole-diffusers"
        text = f"this needs {error.name}: pip install '{package}'"
    print(f"{name}: {text}", file=sys.stderr)
    return 1
