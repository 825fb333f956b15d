"""`mole train-lora`: teach a base one concept from a folder of pictures; the result is an ordinary LoRA file."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import (
    given,
    is_main_process,
    json_or_text,
    own_device,
    pipeline,
    read_settings,
    samples,
    write_settings,
)

SECTIONS = ("base", "data", "concept", "prior", "training")
OWN = ("trigger", "prompt", "resolution", "format")
PRIOR = ("prompt", "data", "count", "steps", "guidance")
TRAINING = (
    "rank", "alpha", "layers", "steps", "batch", "lr", "text_lr", "seed", "precision", "accumulation", "every", "keep",
)  # fmt: skip


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "train-lora", help="teach a base one concept from pictures, as a LoRA; `accelerate launch` divides the work"
    )
    command.add_argument("--base", help="a diffusers pipeline; default: the embedded world")
    command.add_argument("--device", default=None, help="default: cuda where there is one")
    command.add_argument("--out", type=Path, help="folder of the LoRA (named as the folder), checkpoints and log")
    command.add_argument("--config", type=Path, help="YAML or JSON with every setting; flags go before it")
    command.add_argument("--write-config", type=Path, metavar="FILE", help="write the settings as YAML or JSON, and stop")
    command.add_argument("--resume", metavar="latest|checkpoint-N", help="go on with the run in --out")
    what = command.add_argument_group("the concept")
    what.add_argument("--data", action="append", default=[], metavar="FOLDER", help="pictures, with captions or without")
    what.add_argument("--trigger", help="the words that will call the concept, written into the file")
    what.add_argument("--prompt", help="caption of pictures without one; default: the trigger")
    what.add_argument("--resolution", type=int, metavar="PIXELS", help="squares of this side; default: the base's own")
    what.add_argument("--format", choices=["diffusers", "kohya"], help="of the file's keys; default: diffusers")
    prior = command.add_argument_group("prior preservation: pictures of the class on which the base is to stay as it is")
    prior.add_argument("--prior-prompt", help='what the base draws for it: "a photo of a dog"')
    prior.add_argument("--prior-data", action="append", default=[], metavar="FOLDER", help="or pictures of your own")
    prior.add_argument("--prior-count", type=int, metavar="N", help="pictures to draw; default 64")
    prior.add_argument("--prior-steps", type=int, metavar="N", help="of the sampler; default 25")
    prior.add_argument("--prior-guidance", type=float, metavar="SCALE", help="default 7.5")
    prior.add_argument("--prior-weight", type=float, metavar="WEIGHT", help="of its loss; default 1")
    how = command.add_argument_group("how")
    how.add_argument("--layers", action="append", default=[], metavar="KIND", help="repeatable; attention, feed-forward, ..")
    for name in (n for n in TRAINING if n != "layers"):
        how.add_argument(f"--{name.replace('_', '-')}", type=json_or_text, metavar="VALUE")
    how.add_argument("--beam", action="store_true", default=None, help="let ranks compete (BeamLoRA); rank 8 or more")
    how.add_argument("--checkpointing", action="store_true", default=None, help="less memory, more time")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked, as plain data: the file's, with the flags' on top."""
    found = read_settings(args.config, SECTIONS) if args.config else {}
    training = {name: getattr(args, name) for name in (*TRAINING, "beam", "checkpointing")} | {"prior": args.prior_weight}
    flags = {
        "concept": {name: getattr(args, name) for name in OWN},
        "prior": {name: getattr(args, f"prior_{name}") for name in PRIOR},
        "training": training,
    }
    merged = {name: found.get(name, {}) | given(section) for name, section in flags.items()}
    for name, known in (("concept", OWN), ("prior", PRIOR), ("training", list(training))):
        if unknown := set(merged[name]) - set(known):
            raise ValueError(f"unknown {name} options {sorted(unknown)}; known: {list(known)}")
    return {"base": "emoji", "data": []} | found | merged | given({"base": args.base, "data": args.data})


def run(args: argparse.Namespace) -> int:
    """Train the LoRA and write it to --out."""
    asked = settings(args)
    if args.write_config:
        write_settings(args.write_config, asked)
        return 0
    if args.out is None or not asked["data"] or not asked["concept"].get("trigger"):
        raise ValueError("--out (a folder), --data (a folder of pictures) and --trigger (the concept's words) are needed")
    prior = asked["prior"]
    if prior and not prior.get("data") and not prior.get("prompt"):
        raise ValueError("--prior-prompt is needed: what the base is to draw for prior preservation")
    facts = _train(args, asked)
    if is_main_process():
        print(json.dumps(facts) if args.json else f"{facts['file']}: trigger {asked['concept']['trigger']!r}")
    return 0


def _train(args: argparse.Namespace, asked: Mapping[str, Any]) -> dict[str, Any]:
    from mole_diffusers.training.concept import train_lora

    concept, config = asked["concept"], _config(asked["training"])
    pipe = pipeline(asked["base"], args.device or own_device(), half=False)
    pipe.set_progress_bar_config(disable=True)
    prompt = concept.get("prompt") or concept["trigger"]
    pictures = samples(pipe, asked["data"], prompt=prompt, side=concept.get("resolution"))
    if mute := [caption for caption in pictures.captions if concept["trigger"] not in caption]:
        warnings.warn(f"the caption {mute[0]!r} lacks the trigger {concept['trigger']!r}, {len(mute)} do", stacklevel=2)
    prior = _prior(pipe, asked, args.out if is_main_process() else None, side=concept.get("resolution"), seed=config.seed)
    name, folder = args.out.name, args.out
    tensors = train_lora(pipe, pictures, config, prior=prior, name=name, folder=folder, resume_from=args.resume)
    path = args.out / f"{args.out.name}.safetensors"
    if is_main_process():
        _save(pipe, tensors, path, config, concept=concept, pictures=len(pictures.captions))
    return {"file": str(path), "trigger": concept["trigger"], "pictures": len(pictures.captions), "rank": config.rank}


def _config(training: Mapping[str, Any]) -> Any:
    """The training section as a ConceptConfig; "precision" is the name of autocast's dtype."""
    from mole_diffusers.training.concept import ConceptConfig
    from mole_diffusers.training.config import PRECISIONS
    from mole_diffusers.training.engine import DTYPES

    options: dict[str, Any] = {name: tuple(value) if name == "layers" else value for name, value in training.items()}
    precision = options.pop("precision", "no") or "no"  # a bare no is False in YAML
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {list(PRECISIONS)}")
    numbers = [f.name for f in fields(ConceptConfig) if f.type in ("int", "float") and f.name in options]
    if bad := [n for n in numbers if isinstance(options[n], str)]:
        raise ValueError(f"{bad[0]} must be a number, got {options[bad[0]]!r}")
    if "rank" in options:
        options.setdefault("alpha", options["rank"])
    return ConceptConfig(**options, autocast=DTYPES.get(precision))


def _prior(pipe: Any, asked: Mapping[str, Any], folder: Path | None, *, side: int | None, seed: int) -> Any:
    """Pictures of the class: the user's, else those that the base draws, else none."""
    from mole_diffusers.training.prior import class_samples

    options = dict(asked["prior"])
    prompt, folders = options.pop("prompt", None), options.pop("data", [])
    if folders:
        return samples(pipe, folders, prompt=prompt, side=side)
    if prompt is None:
        return None
    return class_samples(pipe, prompt, seed=seed, folder=folder, **options)


def _save(pipe: Any, tensors: Any, path: Path, config: Any, *, concept: Mapping[str, Any], pictures: int) -> None:
    from mole_diffusers.training.lora_saving import header, save_kohya, save_lora

    about = header(pipe, title=path.stem, rank=config.rank, alpha=config.alpha, pictures=pictures)
    about["mole.training"] = json.dumps({name: str(value) for name, value in asdict(config).items()})
    if concept.get("format", "diffusers") == "kohya":
        save_kohya(tensors, path, alpha=config.alpha, triggers=concept["trigger"], about=about)
    else:
        save_lora(tensors, path, alpha=config.alpha, rank=config.rank, triggers=concept["trigger"], about=about)
