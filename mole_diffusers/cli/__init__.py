"""The `mole` command. Each file holds one command: `add(commands)` states its arguments, and the function that it sets as
`run` does the work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from mole_diffusers.cli import app, compose, evaluate, grid, index, inspect, merge, retrieve, train, train_lora

COMMANDS = (inspect, compose, index, retrieve, grid, app, train, train_lora, evaluate, merge)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 with one line on stderr for bad input."""
    args = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        return command(args)
    except (ValueError, OSError) as error:
        print(f"mole {args.command}: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    whole = argparse.ArgumentParser(prog="mole", description="Compose concept LoRAs by learned gates.")
    commands = whole.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    return whole
