"""`mole train`: train gates for a set of LoRAs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import add_experts, chosen_experts, pipeline
from mole_diffusers.gates import FAMILIES, FEATURES, GRANULARITIES, INPUTS, GateConfig
from mole_diffusers.mixing import TOTALS


def add(commands: Any) -> None:
    """Add the command to the parser."""
    train = commands.add_parser("train", help="train gates for a set of LoRAs")
    add_experts(train)
    train.add_argument("--out", type=Path, required=True, help="gates, checkpoints and log; a run cut off goes on")
    train.add_argument("--prompt", action="append", default=[], help="a composed prompt; repeatable")
    train.add_argument(
        "--single", action="append", default=[], metavar="NAME=PROMPT", help="one expert's prompt; repeatable"
    )
    train.add_argument("--style", action="append", default=[], metavar="NAME", help="an expert that acts everywhere")
    train.add_argument("--data", type=Path, action="append", default=[], help="a folder of pictures with captions")
    train.add_argument("--family", choices=[f for f in FAMILIES if f not in ("sum", "mean")], default="mole")
    for name, choices in (("granularity", GRANULARITIES), ("total", TOTALS), ("inputs", INPUTS), ("features", FEATURES)):
        train.add_argument(f"--{name}", choices=list(choices), default=getattr(GateConfig(), name))
    for name, kind in (("steps", int), ("batch", int), ("lr", float), ("seed", int), ("balance", float), ("denoise", float)):
        train.add_argument(f"--{name}", type=kind)
    train.add_argument("--precision", choices=["no", "bf16", "fp16"])
    train.add_argument("--resume", metavar="latest|checkpoint-N", help="go on with the run in --out")
    train.add_argument("--json", action="store_true")
    train.set_defaults(run=train_gates)


def train_gates(args: argparse.Namespace) -> int:
    """Train gates and write them to --out."""
    from mole_diffusers.mixture import attach
    from mole_diffusers.training.config import GateTraining
    from mole_diffusers.training.data import encode, read_folder
    from mole_diffusers.training.loop import train_gates as run
    from mole_diffusers.training.study import Lesson

    singles: dict[str, list[str]] = {}
    for text in args.single:
        name, separator, prompt = text.partition("=")
        if not separator:
            raise ValueError(f"--single {text!r} is not NAME=PROMPT")
        singles.setdefault(name, []).append(prompt)
    gates = GateConfig(args.family, args.granularity, args.total, args.inputs, args.features)
    experts = chosen_experts(args, " ".join(args.prompt))
    pipe = pipeline(args.base, args.device, half=False)
    mixture = attach(pipe, experts, gates)
    pictures = [pair for folder in args.data for pair in zip(*read_folder(folder), strict=True)]
    samples = encode(pipe, *zip(*pictures, strict=True)) if pictures else None
    given = {n: getattr(args, n) for n in ("steps", "batch", "lr", "seed", "precision")}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    terms = {"single": bool(singles), "composed": bool(args.prompt), "denoise": args.denoise, "balance": args.balance}
    config = GateTraining(terms={name: float(weight) for name, weight in terms.items() if weight}, **options)
    lesson = Lesson(singles, args.prompt, styles=args.style, samples=samples)
    log = run(pipe, mixture, lesson, config=config, folder=args.out, resume_from=args.resume)
    mixture.save_pretrained(args.out)
    print(
        json.dumps({"out": str(args.out), **log[-1]})
        if args.json
        else f"{args.out}: loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f}"
    )
    return 0
