"""`mole grid`: one picture changed along two axes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mole_diffusers.cli.studio import add_studio, studio, wanted_recipe


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("grid", help="a grid of one picture changed along two axes: weight, seed, arm, ...")
    command.add_argument("prompt", help="with <lora:name:strength> tags")
    add_studio(command)
    for side, default in (("x", "arm=base,sum,gates"), ("y", "seed=0,1,2")):
        command.add_argument(f"--{side}", default=default, help=f"'weight fox=0,0.5,1', 'seed=1,2', ...; default {default}")
    command.add_argument("--gates", default="auto", help="auto, sum, mean, or the name of trained gates")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--guidance", type=float, default=3.0)
    command.add_argument("--out", type=Path, default=Path("grid.png"))
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw every cell and write the sheet."""
    from mole_diffusers.studio.xy_grid import cells, parse_axis, sheet

    x, y = parse_axis(args.x), parse_axis(args.y)
    place = studio(args)
    recipe = place.complete(wanted_recipe(place, args))
    rows = cells(recipe, x, y)
    pictures = [[place.draw(place.complete(cell)) for cell in row] for row in rows]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, x, y).save(args.out)
    print(f"{len(rows)} x {len(rows[0])} pictures: {args.out}")
    return 0
