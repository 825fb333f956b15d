"""`mole inspect`: what is in a LoRA file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import pipeline

if TYPE_CHECKING:
    from mole_diffusers.lora import Expert


def inspect(
    files: Annotated[list[Path], Argument(metavar="FILE", help="LoRA files.")],
    base: Annotated[str | None, Option(metavar="MODEL", help="A pipeline to match the layers with.")] = None,
    base_config: options.BaseConfig = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what is in LoRA files: format, base model, trigger words, and what cannot be used."""
    from mole_diffusers.lora import read_expert
    from mole_diffusers.lora.safe_files import printable

    models = {}
    if base:
        from mole_diffusers.patching.denoiser_inputs import models_of

        models = models_of(pipeline(base, config=base_config))
    reports, failed = list[dict[str, Any]](), False
    for path in files:
        try:
            reports.append(describe(read_expert(path), path, models))
        except (ValueError, FileNotFoundError) as error:
            failed = True
            reports.append({"file": str(path), "error": str(error)})
    if as_json:
        print(json.dumps(reports, indent=1))
    else:
        for report in reports:
            print("\n".join(f"{key:>9}  {printable(str(value))}" for key, value in report.items()) + "\n")
    if failed:
        raise Exit(1)


def describe(expert: Expert, path: Path, models: dict[str, Any]) -> dict[str, Any]:
    """What one file holds and, where models are given, how many of its layers they have and why not the rest."""
    from mole_diffusers.lora import COMPONENTS, stated_base, summarize
    from mole_diffusers.lora.stacking import match

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
    if models:
        missing = match(expert, models).unmatched
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
