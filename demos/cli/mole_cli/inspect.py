"""`mole inspect`: show the contents of a LoRA file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from mole_cli import options
from mole_cli.common import opened
from mole_cli.console import show

if TYPE_CHECKING:
    from mole_diffusers.lora import Expert


def inspect(
    files: Annotated[list[Path], Argument(metavar="FILE", help="LoRA files.")],
    base: Annotated[str | None, Option(metavar="MODEL", help="a pipeline to match the layers with.")] = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what is in LoRA files: format, base model, trigger words, and what cannot be used."""
    from mole_diffusers.safe_files import printable

    if base is None and (device or base_config):
        raise ValueError("--device and --base-config open a base to match the layers with: give --base")
    pipe = opened(base, {"device": device, "base_config": base_config}).pipe if base else None
    reports, failed = list[dict[str, Any]](), False
    for path in files:
        try:
            if not path.exists():
                raise FileNotFoundError(f"no LoRA file at {path}")
            from mole_diffusers.lora import read_expert  # which takes seconds

            reports.append(describe(read_expert(path), path, pipe))
        except (ValueError, FileNotFoundError) as error:
            failed = True
            reports.append({"file": str(path), "error": str(error)})
    words = ["\n".join(f"{key:>9}  {printable(str(value))}" for key, value in report.items()) for report in reports]
    show(reports, "\n\n".join(words), as_json=as_json)
    if failed:
        raise Exit(1)


def describe(expert: Expert, path: Path, pipe: Any) -> dict[str, Any]:
    """The contents of one file. With a pipeline, also how many layers match its models, and why the others do not."""
    from mole_diffusers.lora import COMPONENTS, stated_base, summarize, words_of

    (low, high), own = expert.ranks, words_of(expert)
    stated = stated_base(expert.metadata)
    error = max(w.error for layers in expert.layers.values() for w in layers.values())
    report: dict[str, Any] = {
        "file": str(path),
        "format": expert.format,
        "base": expert.base + (f" (its metadata says {stated})" if stated not in (None, expert.base) else ""),
        "algorithm": ", ".join(f"{name} {count}" for name, count in expert.notes.algorithms.items()),
        "ranks": str(low) if low == high else f"{low}..{high}",
        "parts": ", ".join(f"{part} {len(expert.layers[part])}" for part in COMPONENTS if part in expert.layers),
        "triggers": ", ".join(own.words) + ("" if own.stated else ", from its training tags")
        if own.words
        else "none stated",
        "sha256": expert.sha256,
        **summarize(expert.metadata),
    }
    if error:
        report["cut"] = f"LoHa and LoKr layers to lower ranks, relative error at most {error:.2g}"
    if expert.notes.left_out:
        report["left out"] = _reasons(expert.notes.left_out)
    if pipe is not None:
        from mole_diffusers import models_of
        from mole_diffusers.lora import match, with_host_names

        models = models_of(pipe)
        missing = match(with_host_names(expert, pipe, models), models).unmatched
        total = sum(len(layers) for layers in expert.layers.values())
        report["matched"] = f"{total - len(missing)} of {total} layers"
        if missing:
            report["unmatched"] = _reasons(missing)
    return report


def _reasons(why: Mapping[str, str]) -> str:
    """{subject: reason} -> each reason, with the number of subjects and the first of them."""
    grouped: dict[str, list[str]] = {}
    for subject, reason in why.items():
        grouped.setdefault(reason, []).append(subject)
    return "; ".join(
        f"{len(subjects)} layers, as {reason}: {subjects[0]}{', ...' if len(subjects) > 1 else ''}"
        for reason, subjects in grouped.items()
    )
