"""`mole inspect`: what is in a LoRA file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import hosts
from mole_diffusers.lora_files import PARTS, Expert, read_expert


def add(commands: Any) -> None:
    """Add the command to the parser."""
    look = commands.add_parser("inspect", help="what is in a LoRA file")
    look.add_argument("files", nargs="+", type=Path)
    look.add_argument("--base", help="a pipeline to match the layers against; 'emoji' is the embedded world")
    look.add_argument("--json", action="store_true")
    look.set_defaults(run=inspect)


def inspect(args: argparse.Namespace) -> int:
    """One report per file; files that cannot be read are reported and make the status 1."""
    models = hosts(args.base) if args.base else {}
    reports, status = [], 0
    for path in args.files:
        try:
            reports.append(describe(read_expert(path), path, models))
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
