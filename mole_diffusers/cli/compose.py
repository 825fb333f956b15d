"""`mole compose`: a picture with several LoRAs, beside what each does alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import add_experts, chosen_experts, parse_expert, pipeline
from mole_diffusers.cli.libraries import add_search, in_words, opened
from mole_diffusers.retrieval.composing import MODES, composed, report

PROMPT = "noto drawing of a sunflower and a doughnut"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    compose = commands.add_parser("compose", help="make a picture with several LoRAs, beside what each does alone")
    compose.add_argument(
        "prompt", nargs="?", default=PROMPT, help=f"default: {PROMPT!r}; with <lora:..> tags, one picture and not a grid"
    )
    add_experts(compose)
    add_search(compose, required=False)
    compose.add_argument("--mode", default="sum", choices=MODES, help="with --library: what is done with the LoRAs found")
    compose.add_argument("--from", dest="source", type=Path, help="a picture or recipe file to draw again, to --out")
    compose.add_argument("--loras", type=Path, help="a folder of LoRA files that tags and recipes name")
    compose.add_argument("--trained", type=Path, help="a folder with one folder of trained gates each, for tags and recipes")
    compose.add_argument("--gates", help="a folder, a hub id or a family; default: the world's own, else sum")
    compose.add_argument("--seed", type=int, default=0, help="of the first row; each row adds 1")
    compose.add_argument("--rows", type=int, default=4, help="pictures per column")
    compose.add_argument("--steps", type=int, default=20)
    compose.add_argument("--guidance", type=float, default=3.0)
    compose.add_argument("--out", type=Path, default=Path("grid.png"))
    compose.add_argument("--json", action="store_true", help="print what was made for a machine to read")
    compose.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """What a library holds for the prompt, one picture where a recipe or tags say which, else the comparison grid."""
    if args.library is not None:
        return compose_found(args)
    return compose_picture(args) if args.source is not None or "<lora:" in args.prompt else compose_grid(args)


def compose_picture(args: argparse.Namespace) -> int:
    """Draw the recipe of --from, or the prompt with its tags, and write a PNG that holds its recipe."""
    from mole_diffusers.cli.studio import studio, wanted_recipe
    from mole_diffusers.studio import infotext

    wanted = None if args.source is None else infotext.read_any(args.source)
    if wanted is not None and wanted.base not in ("", args.base):
        raise ValueError(f"{args.source.name} was drawn with the base {wanted.base!r}; give it as --base")
    args.gates = args.gates or "auto"
    place = studio(args)
    for name, (path, _) in (parse_expert(text) for text in args.expert):
        place.catalog.add_lora(name, path)
    recipe = place.complete(wanted or wanted_recipe(place, args))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    infotext.save(place.draw(recipe), args.out, recipe)
    print(json.dumps({"out": str(args.out), **recipe.to_dict()}) if args.json else f"{recipe.prompt}: {args.out}")
    return 0


def compose_found(args: argparse.Namespace) -> int:
    """Find the LoRAs that the prompt asks for, draw it without and with them, and say what was chosen and why."""
    from mole_diffusers.inspection.compare import sample

    if args.expert or args.source is not None or "<lora:" in args.prompt:
        raise ValueError("--library chooses the LoRAs; leave --expert, --from and <lora:...> tags out")
    pipe = pipeline(args.base, args.device)
    library, seeds = opened(args, pipe), _seeds(args)
    drawing = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    gates = args.gates or "sum"
    columns = {"base": sample(pipe, args.prompt, seeds, **drawing)}
    asked = {"mode": args.mode, "k": args.k, "threshold": args.threshold, "gates": gates}
    with composed(library, pipe, args.prompt, **asked) as composition:
        columns[f"found ({args.mode})"] = sample(pipe, args.prompt, seeds, **drawing)
    _write_grid(columns, seeds, args.out)
    found, weights = composition.found[0], composition.sets[0]
    facts = {"out": str(args.out), "prompt": args.prompt, "found": report(library, found), "weights": weights}
    shares = ", ".join(f"{name} x {weight:.3g}" for name, weight in weights.items()) or "the base alone"
    words = f"{in_words(found, library)}\ndrawn with {shares}, {args.mode}: {args.out}"
    print(json.dumps(facts | {"mode": args.mode, "gates": gates}) if args.json else words)
    return 0


def compose_grid(args: argparse.Namespace) -> int:
    """Write the comparison grid: rows are seeds, columns are base, each expert alone, sum and gated."""
    from mole_diffusers.inspection.compare import compare
    from mole_diffusers.mixture import attach

    seeds = _seeds(args)
    experts = chosen_experts(args, args.prompt)
    pipe = pipeline(args.base, args.device)
    mixture = attach(pipe, experts, args.gates or _own_gates(args, experts))
    pictures = compare(pipe, mixture, args.prompt, seeds=seeds, num_inference_steps=args.steps, guidance_scale=args.guidance)
    _write_grid(pictures, seeds, args.out)
    facts = {
        "out": str(args.out),
        "prompt": args.prompt,
        "experts": list(mixture.experts),
        "gates": mixture.config.to_dict(),
    }
    print(json.dumps(facts) if args.json else f"{args.prompt}: {args.out}")
    return 0


def _seeds(args: argparse.Namespace) -> list[int]:
    if args.rows < 1:
        raise ValueError(f"--rows must be 1 or more, got {args.rows}")
    return list(range(args.seed, args.seed + args.rows))


def _write_grid(columns: Mapping[str, Sequence[Any]], seeds: Sequence[int], path: Path) -> None:
    from mole_diffusers.inspection.figures import grid

    rows = [[images[i] for images in columns.values()] for i in range(len(seeds))]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, list(columns), [f"seed {s}" for s in seeds]).save(path)


def _own_gates(args: argparse.Namespace, experts: dict[str, Any]) -> str | Path:
    """The embedded world's gates for this set of experts, where it has them."""
    if args.base == "emoji" and not args.expert:
        from mole_diffusers.emoji.world import gate_folders

        for name, folder in gate_folders().items():
            if set(name.split("+")) == set(experts):
                return folder
    return "sum"
