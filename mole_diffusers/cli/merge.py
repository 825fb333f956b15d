"""`mole merge`: several LoRA files as one ordinary LoRA file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import json_or_text, named_values, pipeline
from mole_diffusers.lora import Expert, read_expert
from mole_diffusers.lora.writing import FORMATS, save_expert
from mole_diffusers.merging.activations import Activations
from mole_diffusers.merging.merge import METHODS, by_activations, merge


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("merge", help="several LoRA files as one ordinary LoRA file, without training")
    command.add_argument("files", nargs="+", metavar="FILE[:STRENGTH]")
    command.add_argument("--method", default="svd", choices=list(METHODS))
    command.add_argument("--out", type=Path, required=True, help="the file to write")
    command.add_argument("--rank", type=int, help="of the result at most")
    command.add_argument("--protect", action="append", default=[], metavar="NAME", help="np: leave this one as it is")
    command.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the method; VALUE is JSON")
    command.add_argument("--format", default="diffusers", choices=FORMATS)
    command.add_argument("--base", help="ssr, regmean, iteris, scalars: the pipeline to run; 'emoji' is the embedded world")
    command.add_argument("--own", action="append", default=[], metavar="NAME=PROMPT", help="an expert's own prompt")
    command.add_argument("--device", default=None, help="default: cuda where there is one")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge and write; a LoRA is named as its file, without the suffix."""
    experts = {}
    for text in args.files:
        path, strength = parse_file(text)
        if path.stem in experts:
            raise ValueError(f"two files are named {path.stem!r}; rename one")
        experts[path.stem] = (read_expert(path, path.stem), strength)
    options = {key: json_or_text(value) for key, value in named_values(args.option, "--option")}
    activations = _activations(args, experts) if by_activations(args.method) else None
    one = merge(experts, args.method, rank=args.rank, protect=args.protect, activations=activations, **options)
    save_expert(one, args.out, format=args.format)
    low, high = one.ranks
    facts = {"file": str(args.out), "ranks": [low, high], "triggers": list(one.triggers), **one.metadata}
    print(json.dumps(facts) if args.json else "\n".join(f"{key:>17}  {value}" for key, value in facts.items()))
    return 0


def _activations(args: argparse.Namespace, experts: Mapping[str, tuple[Expert, float]]) -> Activations:
    """Run on --base with the prompts given, else with the trigger words in the files."""
    if args.base is None:
        raise ValueError(f"--method {args.method} runs the experts: give --base")
    prompts = {name: [" ".join(expert.triggers)] for name, (expert, _) in experts.items() if expert.triggers}
    given: dict[str, list[str]] = {}
    for name, prompt in named_values(args.own, "--own"):
        given.setdefault(name, []).append(prompt)
    return Activations(pipeline(args.base, args.device), prompts | given)


def parse_file(text: str) -> tuple[Path, float]:
    """FILE[:STRENGTH]; what follows the last colon is a strength where it is a number."""
    stem, colon, strength = text.rpartition(":")
    try:
        return (Path(stem), float(strength)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
