"""`mole bench`: what a mixture of N LoRAs costs, side by side with the base and with diffusers' own ways."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mole_diffusers.bench.arms import ARMS
from mole_diffusers.bench.clock import CLOCKS
from mole_diffusers.bench.hosts import SIZES
from mole_diffusers.bench.memory import memory_costs
from mole_diffusers.bench.once import attach_costs, collapse_costs, update_costs
from mole_diffusers.bench.report import curve, machine, memory_table, share_table, table
from mole_diffusers.bench.settings import COMPILED, DTYPES, Settings
from mole_diffusers.bench.shares import step_shares
from mole_diffusers.bench.steps import step_costs
from mole_diffusers.gates import FAMILIES, GateConfig

WHAT: Mapping[str, Callable[[Settings, argparse.Namespace], list[Any]]] = {
    "step": lambda settings, args: step_costs(settings, args.arms, args.experts),
    "attach": lambda settings, args: attach_costs(settings, args.experts),
    "collapse": lambda settings, args: collapse_costs(settings, args.experts),
    "update": lambda settings, args: update_costs(settings, args.experts),
    "memory": lambda settings, args: memory_costs(settings, args.arms, args.experts),
    "shares": lambda settings, args: step_shares(settings, args.arms, args.experts),
}


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("bench", help="what a mixture of N LoRAs costs, on a host with random weights")
    command.add_argument("--what", default="step", choices=list(WHAT), help="default: one step of the denoiser")
    command.add_argument("--size", default="tiny", choices=list(SIZES))
    command.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    command.add_argument("--pixels", type=int, default=0, help="side of the picture; default: the host's usual one")
    command.add_argument("--experts", type=int, nargs="+", default=[1, 3, 8], metavar="N", help="default: 1 3 8")
    command.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--repeats", type=int, default=6, help="rounds; in each everything runs once")
    command.add_argument("--gates", default="mole", choices=FAMILIES)
    command.add_argument(
        "--compile", default="no", choices=list(COMPILED), help="the whole UNet, also in CUDA graphs, or its repeated blocks"
    )
    command.add_argument("--channels-last", action="store_true")
    command.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: this process's own time alone")
    command.add_argument("--threads", type=int, default=0, help="on the CPU; default: PyTorch's own choice")
    command.add_argument("--device", default=None, help="default: cuda where there is one")
    command.add_argument("--json", action="store_true")
    command.add_argument("--plot", type=Path, help="also draw cost against N, of steps")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table; ratios are to the base of the same round."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = ("size", "dtype", "pixels", "rank", "repeats", "compile", "channels_last", "clock")
    settings = Settings(**{n: getattr(args, n) for n in names}, device=device, gates=GateConfig(args.gates))
    if min(args.experts) < 1:
        raise ValueError(f"the numbers of experts must be 1 or more, got {args.experts}")
    costs = WHAT[args.what](settings, args)
    if args.plot is not None:
        curve(costs, args.plot)
    if args.json:
        about = {n: getattr(settings, n) for n in names} | {"pixels": settings.side, "gates": args.gates}
        rows = [cost.row() for cost in costs]
        print(json.dumps({"what": args.what, "machine": machine(device), **about, "rows": rows}))
    else:
        print(f"{args.size}, {args.dtype}, {settings.side} pixels, rank {args.rank}, on {machine(device)}")
        tables: dict[str, Callable[[list[Any]], str]] = {"memory": memory_table, "shares": share_table}
        print(tables.get(args.what, table)(costs))
    return 0
