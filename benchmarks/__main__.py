"""Measure the cost of a mixture of N LoRAs, next to the base and diffusers' own ways. See `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pandas as pd
import torch

from benchmarks.arms import ARMS
from benchmarks.clock import CLOCKS
from benchmarks.hosts import SIZES
from benchmarks.once import attaching, collapsing, moving, once_costs, updating
from benchmarks.picture import cold_costs, picture_costs
from benchmarks.settings import COMPILED, DTYPES, Settings
from benchmarks.steps import memory_costs, operation_counts, scaling, step_costs
from mole_diffusers.gates import GATE_TYPES, GateConfig

COUNTED = ("sum", "mole", "flow", "factors", "bound sum", "bound mole")
SCALED = ("base", "again", "set_adapters", "sum", "mole")
DISPATCH = ("base", "again", "set_adapters", *COUNTED)
WHAT: Mapping[str, Callable[[Settings, Sequence[str], Sequence[int]], list[Any]]] = {
    "step": step_costs,
    "dispatch": lambda settings, _, experts: step_costs(replace(settings, size="thin", rank=4), DISPATCH, experts),
    "operations": lambda settings, _, experts: operation_counts(
        replace(settings, size="thin", rank=4, pixels=64), COUNTED, experts
    ),
    "attach": lambda settings, _, experts: once_costs(settings, attaching, experts),
    "moving": lambda settings, _, experts: once_costs(settings, moving, experts),
    "collapse": lambda settings, _, experts: once_costs(settings, collapsing, experts),
    "update": lambda settings, _, experts: once_costs(settings, updating, experts),
    "memory": memory_costs,
    "scaling": lambda settings, _, experts: scaling(settings, SCALED, experts),
    "picture": picture_costs,
    "cold": cold_costs,
}


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    command = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    what = "default: one step; dispatch: one step of a very narrow UNet (use --threads 1 --clock cpu)"
    what += "; operations: how many it has; scaling: curves of it against LoRAs, ranks, pictures and steps"
    what += "; picture: each stage of one; cold: mole draw in a new process"
    command.add_argument("--what", default="step", choices=list(WHAT), help=what)
    command.add_argument("--size", default="tiny", choices=list(SIZES))
    command.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    command.add_argument("--pixels", type=int, default=0, help="side of the picture; default: the host's usual one")
    command.add_argument("--experts", type=int, nargs="+", default=[1, 3, 8], metavar="N", help="default: 1 3 8")
    command.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--pictures", type=int, default=1, help="how many are drawn at once")
    command.add_argument("--repeats", type=int, default=6, help="rounds; everything runs once in each")
    command.add_argument("--gates", default="mole", choices=GATE_TYPES)
    compiled = "compile the whole UNet, the same with CUDA graphs, or its repeated blocks"
    command.add_argument("--compile", default="no", choices=list(COMPILED), help=compiled)
    command.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: only the time of this process")
    command.add_argument("--threads", type=int, default=0, help="on the CPU; default: PyTorch's choice")
    command.add_argument("--device", default=None, help="default: cuda if there is one")
    command.add_argument("--json", action="store_true")
    return command


def machine(device: str) -> str:
    """The card's name, or the number of CPU threads in use."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"


def run(args: argparse.Namespace) -> None:
    """Measure and print the table. Ratios are to the base in the same round."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = ("size", "dtype", "pixels", "rank", "pictures", "repeats", "compile", "clock")
    settings = Settings(**{n: getattr(args, n) for n in names}, device=device, gates=GateConfig(args.gates))
    if min(args.experts) < 1:
        raise ValueError(f"the numbers of experts must be 1 or more, got {args.experts}")
    costs = [asdict(cost) for cost in WHAT[args.what](settings, args.arms, args.experts)]
    about = {n: getattr(settings, n) for n in names} | {"pixels": settings.side, "gates": args.gates}
    if args.json:
        print(json.dumps({"what": args.what, "machine": machine(device), **about, "rows": costs}))
        return
    print(f"{args.size}, {args.dtype}, {settings.side} pixels, rank {args.rank}, on {machine(device)}")
    table = pd.DataFrame(costs).drop(columns="seconds", errors="ignore")  # drop the times of single rounds
    print(table.to_string(index=False, float_format="{:.3f}".format))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 1 with one line on stderr for bad input."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
