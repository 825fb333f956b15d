"""The `mole` command: inspect LoRA files, compose a picture, train gates."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mole_diffusers.gates import FAMILIES, FEATURES, GRANULARITIES, INPUTS, GateConfig
from mole_diffusers.lora_files import PARTS, Expert, read_expert
from mole_diffusers.mixing import TOTALS

PROMPT = "noto drawing of a sunflower and a doughnut"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 with one line on stderr for bad input."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        return command(args)
    except (ValueError, OSError) as error:
        print(f"mole {args.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mole", description="Compose concept LoRAs by learned gates.")
    commands = parser.add_subparsers(dest="command", required=True)

    look = commands.add_parser("inspect", help="what is in a LoRA file")
    look.add_argument("files", nargs="+", type=Path)
    look.add_argument("--base", help="a pipeline to match the layers against; 'emoji' is the embedded world")
    look.add_argument("--json", action="store_true")
    look.set_defaults(run=inspect)

    compose = commands.add_parser("compose", help="make a picture with several LoRAs, beside what each does alone")
    compose.add_argument("prompt", nargs="?", default=PROMPT, help=f"default: {PROMPT!r}")
    _experts(compose)
    compose.add_argument("--gates", help="a folder, a hub id or a family; default: the world's own, else sum")
    compose.add_argument("--seed", type=int, default=0, help="of the first row; each row adds 1")
    compose.add_argument("--rows", type=int, default=4, help="pictures per column")
    compose.add_argument("--steps", type=int, default=20)
    compose.add_argument("--guidance", type=float, default=3.0)
    compose.add_argument("--out", type=Path, default=Path("grid.png"))
    compose.add_argument("--json", action="store_true", help="print what was made for a machine to read")
    compose.set_defaults(run=compose_grid)

    train = commands.add_parser("train", help="train gates for a set of LoRAs")
    _experts(train)
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
    train.add_argument("--autocast", choices=["bf16"])
    train.add_argument("--json", action="store_true")
    train.set_defaults(run=train_gates)
    return parser


def _experts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expert", action="append", default=[], metavar="NAME=FILE[:STRENGTH]", help="repeatable")
    parser.add_argument("--base", default="emoji", help="a diffusers pipeline; default: the embedded world")
    parser.add_argument("--device", default=None, help="default: cuda where there is one")


def inspect(args: argparse.Namespace) -> int:
    """One report per file; files that cannot be read are reported and make the status 1."""
    hosts = _hosts(args.base) if args.base else {}
    reports, status = [], 0
    for path in args.files:
        try:
            reports.append(describe(read_expert(path), path, hosts))
        except (ValueError, FileNotFoundError) as error:
            status = 1
            reports.append({"file": str(path), "error": str(error)})
    if args.json:
        print(json.dumps(reports, indent=1))
    else:
        for report in reports:
            print("\n".join(f"{key:>9}  {value}" for key, value in report.items()) + "\n")
    return status


def describe(expert: Expert, path: Path, hosts: dict[str, Any]) -> dict[str, Any]:
    """The honest report of one file: what it holds and, with hosts, how much of it they have."""
    total = sum(len(layers) for layers in expert.layers.values())
    low, high = expert.ranks
    report: dict[str, Any] = {
        "file": str(path),
        "format": expert.format,
        "base": expert.base,
        "ranks": str(low) if low == high else f"{low}..{high}",
        "parts": ", ".join(f"{part} {len(expert.layers[part])}" for part in PARTS if part in expert.layers),
        "triggers": ", ".join(expert.triggers) or "none stated",
        "sha256": expert.sha256,
    }
    if hosts:
        from mole_diffusers.experts import match

        missing = match(expert, hosts).unmatched
        report["matched"] = f"{total - len(missing)} of {total} layers"
        if missing:
            report["unmatched"] = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return report


def _pipeline(base: str, device: str | None = None, *, half: bool = True) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from mole_diffusers.world import emoji_world

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if base == "emoji":
        return emoji_world(device=device).pipe
    dtype = torch.float16 if half and device.startswith("cuda") else torch.float32
    return DiffusionPipeline.from_pretrained(base, torch_dtype=dtype).to(device)


def _hosts(base: str) -> dict[str, Any]:
    pipe = _pipeline(base)
    return {part: getattr(pipe, part) for part in PARTS if getattr(pipe, part, None) is not None}


def parse_expert(text: str) -> tuple[str, tuple[Path, float]]:
    """NAME=FILE[:STRENGTH] -> (name, (file, strength)); ValueError says what is wrong."""
    name, separator, file = text.partition("=")
    if not separator or not name or not file:
        raise ValueError(f"--expert {text!r} is not NAME=FILE[:STRENGTH]")
    stem, colon, strength = file.rpartition(":")
    if colon and "/" not in strength and "\\" not in strength and not strength.endswith(".safetensors"):
        try:
            return name, (Path(stem), float(strength))
        except ValueError:
            raise ValueError(f"--expert {text!r}: strength {strength!r} is not a number") from None
    return name, (Path(file), 1.0)


def _chosen(args: argparse.Namespace, prompt: str) -> dict[str, tuple[Expert, float]]:
    """The experts asked for, else those of the embedded world that the prompt names; read before a model is loaded."""
    if args.expert:
        chosen = dict(parse_expert(text) for text in args.expert)
    elif args.base != "emoji":
        raise ValueError("give at least one --expert NAME=FILE[:STRENGTH]")
    else:
        from mole_diffusers.world import concept_files

        known = concept_files()
        chosen = {name: (path, 1.0) for name, path in known.items() if f" {name} " in f" {prompt} "}
        if not chosen:
            raise ValueError(f"the prompt names none of the world's concepts: {', '.join(known)}")
    return {name: (read_expert(path, name), strength) for name, (path, strength) in chosen.items()}


def compose_grid(args: argparse.Namespace) -> int:
    """Write the comparison grid: rows are seeds, columns are base, each expert alone, sum and gated."""
    from mole_diffusers.compare import compare
    from mole_diffusers.figures import grid
    from mole_diffusers.mixture import attach

    if args.rows < 1:
        raise ValueError(f"--rows must be 1 or more, got {args.rows}")
    experts = _chosen(args, args.prompt)
    pipe = _pipeline(args.base, args.device)
    mixture = attach(pipe, experts, args.gates or _own_gates(args, experts))
    seeds = list(range(args.seed, args.seed + args.rows))
    pictures = compare(pipe, mixture, args.prompt, seeds=seeds, num_inference_steps=args.steps, guidance_scale=args.guidance)
    rows = [[images[i] for images in pictures.values()] for i in range(len(seeds))]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, list(pictures), [f"seed {s}" for s in seeds]).save(args.out)
    facts = {
        "out": str(args.out),
        "prompt": args.prompt,
        "experts": list(mixture.experts),
        "gates": mixture.config.to_dict(),
    }
    print(json.dumps(facts) if args.json else f"{args.prompt}: {args.out}")
    return 0


def _own_gates(args: argparse.Namespace, experts: dict[str, Any]) -> str | Path:
    """The embedded world's gates for this set of experts, where it has them."""
    if args.base == "emoji" and not args.expert:
        from mole_diffusers.world import gate_folders

        for name, folder in gate_folders().items():
            if set(name.split("+")) == set(experts):
                return folder
    return "sum"


def train_gates(args: argparse.Namespace) -> int:
    """Train gates and write them to --out."""
    from mole_diffusers.mixture import attach
    from mole_diffusers.training.data import encode, read_folder
    from mole_diffusers.training.loop import GateTraining, Lesson
    from mole_diffusers.training.loop import train_gates as run

    singles: dict[str, list[str]] = {}
    for text in args.single:
        name, separator, prompt = text.partition("=")
        if not separator:
            raise ValueError(f"--single {text!r} is not NAME=PROMPT")
        singles.setdefault(name, []).append(prompt)
    gates = GateConfig(args.family, args.granularity, args.total, args.inputs, args.features)
    experts = _chosen(args, " ".join(args.prompt))
    pipe = _pipeline(args.base, args.device, half=False)
    mixture = attach(pipe, experts, gates)
    pictures = [pair for folder in args.data for pair in zip(*read_folder(folder), strict=True)]
    samples = encode(pipe, *zip(*pictures, strict=True)) if pictures else None
    given = {n: getattr(args, n) for n in ("steps", "batch", "lr", "seed", "balance", "denoise", "autocast")}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config = GateTraining(
        single=float(bool(singles)), composed=float(bool(args.prompt)), styles=tuple(args.style), **options
    )
    log = run(pipe, mixture, Lesson(singles, args.prompt, samples), config=config, folder=args.out)
    mixture.save_pretrained(args.out)
    print(
        json.dumps({"out": str(args.out), **log[-1]})
        if args.json
        else f"{args.out}: loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
