"""`mole evaluate`: composers side by side on many cases and seeds, with intervals."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import add_experts, chosen_device, chosen_experts, named_values, pipeline
from mole_diffusers.evaluation import checkpoint_protocol, emoji_protocol, plots
from mole_diffusers.evaluation.arms import gates_of, traced
from mole_diffusers.evaluation.checkpoint_protocol import judged, judging_sheet
from mole_diffusers.evaluation.choosing import ARMS, chosen_arms, moved, obstacles
from mole_diffusers.evaluation.reporting import EMOJI, Report, of_scores
from mole_diffusers.evaluation.rows import Row, Rows
from mole_diffusers.evaluation.runner import Arm, Bench, Case, crowded, evaluate, found
from mole_diffusers.evaluation.search import best_weights, grid, read_weights

REAL = ("expert", "cases", "images", "own", "style", "clip", "dino")  # what only a real checkpoint is asked for


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "evaluate", help="compare composers; a killed run goes on; accelerate launch or torchrun divide it"
    )
    add_experts(command)
    command.add_argument("--arm", action="append", metavar="NAME", help=f"repeatable; of {', '.join(ARMS)}; default: all")
    command.add_argument("--split", choices=["validation", "test"], default="validation", help="of the embedded world")
    command.add_argument("--limit", type=int, help="cases per kind; default: all")
    command.add_argument(
        "--cases", type=Path, help='JSON lines of {"concepts": [..], "prompt": ".."}, for a real checkpoint'
    )
    command.add_argument("--images", action="append", default=[], metavar="NAME=FOLDER", help="a concept's own pictures")
    command.add_argument("--own", action="append", default=[], metavar="NAME=PROMPT", help="a concept's own prompt")
    command.add_argument("--gates", type=Path, help="folder of trained gates, one folder per case, named a+b")
    command.add_argument("--style", action="append", default=[], metavar="NAME", help="a concept that is a style")
    command.add_argument(
        "--share", action="append", type=float, default=[], help="repeatable; strength moves from subjects, 0, to styles, 1"
    )
    command.add_argument("--attached", action="append", type=int, default=[], help="repeatable; so many experts, some idle")
    command.add_argument("--search", action="store_true", help="search strengths on the split; writes weights.json in --out")
    command.add_argument("--weights", type=Path, help="strengths by kind for the arm 'grid search': weights.json")
    command.add_argument("--clip", help="a CLIP model, for a real checkpoint")
    command.add_argument("--dino", help="a DINO model, for a real checkpoint")
    command.add_argument("--sheet", action="store_true", help="write a sheet to judge pairs of arms on, in both orders")
    command.add_argument("--judged", action="store_true", help="count the answers on the sheet in --out, and nothing else")
    command.add_argument("--seeds", type=int, default=8)
    command.add_argument("--seed", type=int, default=1000, help="the first seed")
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--guidance", type=float, default=3.0)
    command.add_argument("--out", type=Path, default=Path("evaluation"))
    command.add_argument("--json", action="store_true", help="print the rows")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw and measure what --out does not hold yet, then write the tables, the figures and the sheet."""
    from accelerate import PartialState

    if args.judged:
        print(judged(args.out))
        return 0
    if args.limit is not None and args.limit < 1 or args.seeds < 1:
        raise ValueError("--limit and --seeds must be 1 or more")
    if args.search and args.base != "emoji":
        raise ValueError("--search counts successes, which only the judge of the embedded world tells")
    if args.search and args.split == "test":
        raise ValueError("--search chooses strengths, and nothing is chosen on the test split: use --split validation")
    state = PartialState(cpu=args.device == "cpu")
    bench, cases, look, gates = _emoji(args) if args.base == "emoji" else _checkpoint(args)
    if args.attached:
        cases = crowded(cases, sorted(bench.experts), args.attached)
    arms = _arms(args, bench, gates, cases=cases)
    seeds = range(args.seed, args.seed + args.seeds)
    rows = Rows(args.out, state.process_index)
    evaluate(bench, arms, cases, look, seeds=seeds, rows=rows, processes=state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        own = found(bench, arms, cases, seeds=seeds, rows=rows)
        report = EMOJI if args.base == "emoji" else of_scores(bench.styles)
        _write(args, own, report)
        if find_spec("matplotlib") is None:
            print("figures need matplotlib: pip install 'mole-diffusers[plot]'", file=sys.stderr)
            return 0
        _figures(args, own, report)
        _heat_map(args.out / "gates.png", bench, arms, cases)
    return 0


def _arms(args: argparse.Namespace, bench: Bench, gates: Path | None, *, cases: Sequence[Case]) -> list[Arm]:
    """The arms that were asked for, or of all of them those that can be drawn; what is left out is said."""
    if args.search:
        return grid(bench)
    weights = read_weights(args.weights) if args.weights else None
    names = args.arm or (["sum", "gates"] if args.share else list(ARMS))
    kept = obstacles(names, bench, gates, weights=weights) if not args.arm else {}
    for reason in kept.values():
        print(f"left out: {reason}", file=sys.stderr)
    names = [name for name in names if name not in kept]
    arms = moved(names, bench, gates, shares=args.share) if args.share else chosen_arms(names, bench, gates, weights=weights)
    idle = [a.name for a in arms if not any(map(a.covers, cases)) and not a.name.startswith("alone ")]
    if idle:
        reason = (
            f"{idle} can draw none of the cases (gates: {gates}, where {gates_of(Path())(cases[0])} is the first's folder)"
        )
        if args.arm:
            raise ValueError(reason)
        print(f"left out: {reason}", file=sys.stderr)
    return arms


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"num_inference_steps": args.steps, "guidance_scale": args.guidance}


def _first(groups: Any, limit: int | None) -> dict[str, Sequence]:
    return {kind: group[:limit] for kind, group in groups.items()}


def _emoji(args: argparse.Namespace) -> tuple[Bench, list, Any, Path]:
    from mole_diffusers import emoji
    from mole_diffusers.emoji.world import emoji_world

    if ignored := [f"--{name}" for name in REAL if getattr(args, name)]:
        raise ValueError(f"{', '.join(ignored)}: the embedded world has its own; give a --base to evaluate another")
    world = emoji_world(device=chosen_device(args.device))
    split = emoji.TEST if args.split == "test" else emoji.VALIDATION
    found = emoji_protocol.cases(_first(split, args.limit))
    look = emoji_protocol.Look(world, {case.prompt: scene for case, scene in found})
    return (
        emoji_protocol.bench(world, _options(args)),
        [case for case, _ in found],
        look,
        args.gates or world.folder / "gates",
    )


def _checkpoint(args: argparse.Namespace) -> tuple[Bench, list, Any, Path | None]:
    if missing := [f"--{name}" for name in ("cases", "clip", "dino") if getattr(args, name) is None]:
        raise ValueError(f"evaluating a real checkpoint needs {', '.join(missing)}")
    chosen = chosen_experts(args, "")
    experts = {name: expert for name, (expert, _) in chosen.items()}
    strengths = {name: strength for name, (_, strength) in chosen.items() if strength != 1}
    cases = checkpoint_protocol.read_cases(args.cases, list(experts))
    folders = {name: Path(folder) for name, folder in named_values(args.images, "--images")}
    look = checkpoint_protocol.Look(args.clip, args.dino, folders, device=chosen_device(args.device))
    prompts: dict[str, list[str]] = {}
    for name, prompt in named_values(args.own, "--own"):
        prompts.setdefault(name, []).append(prompt)
    if unknown := set(args.style) - set(experts):
        raise ValueError(f"--style {sorted(unknown)}: no such experts; known: {sorted(experts)}")
    pipe, styles = pipeline(args.base, args.device), frozenset(args.style)
    bench = Bench(
        pipe,
        experts,
        _options(args),
        args.base,
        prompts=prompts,
        styles=styles,
        strengths=strengths,
        measured=look.said,
    )
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    return bench, [case for group in _first(kinds, args.limit).values() for case in group], look, args.gates


def _write(args: argparse.Namespace, rows: list[Row], report: Report) -> None:
    """The table, printed too, and what was asked for beside it."""
    text = report.text(rows)
    (args.out / "table.md").write_text(text + "\n")
    print(json.dumps(rows) if args.json else text)
    if args.search:
        (args.out / "weights.json").write_text(json.dumps(best_weights(rows), indent=1) + "\n")
    if args.sheet:
        print(f"{judging_sheet(args.out, rows)} questions in {args.out / 'sheet'}")


def _figures(args: argparse.Namespace, rows: list[Row], report: Report) -> None:
    """Every figure that the rows allow, beside them; one that they do not allow is said."""
    plots.sample_grid(rows, args.out, args.out / "samples.png", case=rows[0]["case"])
    report.draw_bars(rows, args.out / "bars.png")
    asked = {"experts": (args.attached, report.draw_count), "frontier": (args.share, report.draw_frontier)}
    for name, (wanted, draw) in asked.items():
        try:
            if wanted:
                draw(rows, args.out / f"{name}.png")
        except ValueError as error:
            print(f"no {name}.png: {error}", file=sys.stderr)


def _heat_map(path: Path, bench: Bench, arms: Sequence[Arm], cases: Sequence[Case]) -> None:
    """What trained gates decide, for the first case that has them."""
    seen = next(((arm, case) for arm in arms for case in cases if arm.name == "gates" and arm.covers(case)), None)
    if seen is not None:
        plots.heat_map(traced(bench, *seen), path)
