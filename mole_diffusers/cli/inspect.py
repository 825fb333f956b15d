"""`mole inspect`: what is in a LoRA file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import hosts
from mole_diffusers.lora import COMPONENTS, Expert, read_expert, stated_base, summarize
from mole_diffusers.lora.safe_files import printable
from mole_diffusers.lora.stacking import match


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
            print("\n".join(f"{key:>9}  {printable(str(value))}" for key, value in report.items()) + "\n")
    return status


def describe(expert: Expert, path: Path, hosts: dict[str, Any]) -> dict[str, Any]:
    """The honest report of one file: what it holds and, with hosts, how much of it they have, and why not the rest."""
    low, high = expert.ranks
    stated = stated_base(expert.metadata)
    error = max(w.error for layers in expert.layers.values() for w in layers.values())
    report: dict[str, Any] = {
        "file": str(path),
        "format": expert.format,
        "base": expert.base + (f" (its metadata says {stated})" if stated not in (None, expert.base) else ""),
        "algorithm": ", ".join(f"{name} {count}" for name, count in expert.algorithms.items()),
        "ranks": str(low) if low == high else f"{low}..{high}",
        "parts": ", ".join(f"{part} {len(expert.layers[part])}" for part in COMPONENTS if part in expert.layers),
        "triggers": ", ".join(expert.triggers) or "none stated",
        "sha256": expert.sha256,
        **summarize(expert.metadata),
    }
    if error:
        report["cut"] = f"LoHa and LoKr layers to lower ranks, relative error at most {error:.2g}"
    if expert.left_out:
        report["left out"] = _reasons(expert.left_out)
    if hosts:
        missing = match(expert, hosts).unmatched
        total = sum(len(layers) for layers in expert.layers.values())
        report["matched"] = f"{total - len(missing)} of {total} layers"
        if missing:
            report["unmatched"] = _reasons(missing)
    return report


def _reasons(why: Mapping[str, str]) -> str:
    """{thing: reason} -> each reason with how many things it holds for and the first of them."""
    grouped: dict[str, list[str]] = {}
    for thing, reason in why.items():
        grouped.setdefault(reason, []).append(thing)
    return "; ".join(
        f"{len(things)} layers, as {reason}: {things[0]}{', ...' if len(things) > 1 else ''}"
        for reason, things in grouped.items()
    )
