"""`mole bench`: what a step with N LoRAs costs, side by side with the base and with diffusers' own ways."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mole_diffusers.bench.arms import ARMS
from mole_diffusers.bench.hosts import SIZES
from mole_diffusers.bench.report import curve, machine, table
from mole_diffusers.bench.steps import COMPILED, DTYPES, Settings, step_costs
from mole_diffusers.gates import FAMILIES, GateConfig


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("bench", help="what a step with N LoRAs costs, on a host with random weights")
    command.add_argument("--size", default="tiny", choices=list(SIZES))
    command.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    command.add_argument("--pixels", type=int, default=0, help="side of the picture; default: the host's usual one")
    command.add_argument("--experts", type=int, nargs="+", default=[1, 3, 8], metavar="N", help="default: 1 3 8")
    command.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--repeats", type=int, default=6, help="rounds; in each every arm runs once")
    command.add_argument("--gates", default="mole", choices=FAMILIES)
    command.add_argument("--compile", default="no", choices=list(COMPILED), help="the whole UNet, or its repeated blocks")
    command.add_argument("--channels-last", action="store_true")
    command.add_argument("--threads", type=int, default=0, help="on the CPU; default: PyTorch's own choice")
    command.add_argument("--device", default=None, help="default: cuda where there is one")
    command.add_argument("--json", action="store_true")
    command.add_argument("--plot", type=Path, help="also draw cost against N")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table; ratios are to the base's step of the same round."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = ("size", "dtype", "pixels", "rank", "repeats", "compile", "channels_last")
    settings = Settings(**{n: getattr(args, n) for n in names}, device=device, gates=GateConfig(args.gates))
    costs = step_costs(settings, args.arms, args.experts)
    if args.plot is not None:
        curve(costs, args.plot)
    if args.json:
        about = {n: getattr(settings, n) for n in names} | {"pixels": settings.side, "gates": args.gates}
        print(json.dumps({"machine": machine(device), **about, "rows": [cost.row() for cost in costs]}))
    else:
        print(f"{args.size}, {args.dtype}, {settings.side} pixels, rank {args.rank}, on {machine(device)}")
        print(table(costs))
    return 0
