"""`mole train`: train gates for a set of LoRAs. A file can hold every setting; flags go before it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mole_diffusers.cli.common import (
    add_experts,
    chosen_experts,
    given,
    is_main_process,
    json_or_text,
    named_values,
    own_device,
    pipeline,
    read_settings,
    samples,
    write_settings,
)
from mole_diffusers.gates import FAMILIES, GateConfig

TRAINING = (
    "initial", "steps", "batch", "accumulation", "drop", "lr", "schedule", "warmup", "weight_decay", "max_norm", "ema",
    "precision", "seed", "every", "keep", "tracker",
)  # fmt: skip
RECOMMENDED = "flow"  # what the validation compositions of docs/results.md chose
SECTIONS = ("base", "experts", "gates", "lesson", "data", "clip", "training")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    train = commands.add_parser("train", help="train gates for a set of LoRAs; `accelerate launch` divides the work")
    add_experts(train)
    train.set_defaults(base=None)
    train.add_argument("--out", type=Path, help="gates, checkpoints, log and pictures go here")
    train.add_argument("--config", type=Path, help="YAML or JSON with every setting; flags go before it")
    train.add_argument("--write-config", type=Path, metavar="FILE", help="write the settings as YAML or JSON, and stop")
    train.add_argument("--resume", metavar="latest|checkpoint-N", help="go on with the run in --out")
    words = train.add_argument_group("what there is to learn from")
    words.add_argument("--prompt", action="append", default=[], help="a composed prompt; repeatable, as all below")
    words.add_argument("--single", action="append", default=[], metavar="NAME=PROMPT", help="one expert's prompt")
    words.add_argument(
        "--part", action="append", default=[], metavar="PROMPT", help="a subject of the prompt, left to right"
    )
    words.add_argument("--other", action="append", default=[], metavar="NAME=WORD", help="may stand in the expert's place")
    words.add_argument("--plain", action="append", default=[], metavar="PROMPT", help="names no expert")
    words.add_argument("--style", action="append", default=[], metavar="NAME", help="an expert that acts everywhere")
    words.add_argument("--data", action="append", default=[], metavar="FOLDER", help="pictures with captions")
    words.add_argument("--clip", help="a CLIP of transformers, folder or hub id; the embedded world has its own")
    how = train.add_argument_group("how")
    how.add_argument("--term", action="append", default=[], metavar="NAME[=WEIGHT][,OPTION=VALUE]", help="an objective")
    how.add_argument("--validate", type=int, metavar="N", help="draw the composed prompts every N updates")
    how.add_argument("--checkpointing", action="store_true", default=None, help="less memory, more time")
    for name in TRAINING:
        how.add_argument(f"--{name.replace('_', '-')}", type=json_or_text, metavar="VALUE")
    gates = train.add_argument_group("gates")
    for field in fields(GateConfig):
        families = f"of {[f for f in FAMILIES if f not in ('sum', 'mean')]}; default: {RECOMMENDED}"
        known = families if field.name == "family" else None
        kind = json_or_text if isinstance(field.default, bool) else type(field.default)
        gates.add_argument(f"--{field.name}", type=kind, metavar="VALUE", help=known)
    train.add_argument("--push-to-hub", metavar="REPO", help="upload the gates with a card")
    train.add_argument("--json", action="store_true")
    train.set_defaults(run=run)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked, as plain data: the file's, with the flags' on top."""
    found = read_settings(args.config, SECTIONS) if args.config else {}
    lesson = {"composed": args.prompt, "plain": args.plain, "styles": args.style}
    lesson |= {"singles": _grouped(args.single, "--single"), "others": _grouped(args.other, "--other")}
    lesson |= {"parts": _parts(args)}
    training = {name: getattr(args, name) for name in (*TRAINING, "checkpointing")}
    training |= {"terms": dict(_term(text) for text in args.term)}
    if args.validate is not None:
        training["validation"] = found.get("training", {}).get("validation", {}) | {"every": args.validate}
    flags = {
        "experts": dict(named_values(args.expert, "--expert")),
        "gates": {field.name: getattr(args, field.name) for field in fields(GateConfig)},
        "lesson": lesson,
        "training": training,
    }
    merged = {name: found.get(name, {}) | given(section) for name, section in flags.items()}
    merged["gates"] = {"family": RECOMMENDED} | merged["gates"]
    alone = {"base": args.base, "data": args.data, "clip": args.clip}
    return {"base": "emoji", "data": [], "clip": None} | found | merged | given(alone)


def _parts(args: argparse.Namespace) -> dict[str, list[str]]:
    if args.part and len(args.prompt) != 1:
        raise ValueError(f"--part tells the subjects of one --prompt, got {len(args.prompt)} prompts")
    return {args.prompt[0]: args.part} if args.part else {}


def _grouped(texts: list[str], option: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, value in named_values(texts, option):
        groups.setdefault(name, []).append(value)
    return groups


def _term(text: str) -> tuple[str, Any]:
    """NAME[=WEIGHT][,OPTION=VALUE] -> (name, its settings)."""
    first, *rest = re.split(r",(?![^\[]*\])", text)  # commas of a list, lengths=[20,50], divide no options
    name, _, weight = first.partition("=")
    return name, {"weight": json_or_text(weight or "1")} | {k: json_or_text(v) for k, v in named_values(rest, "--term")}


def run(args: argparse.Namespace) -> int:
    """Train gates and write them to --out."""
    asked = settings(args)
    if args.write_config:
        write_settings(args.write_config, asked)
        return 0
    if args.out is None:
        raise ValueError("--out is needed: the folder for gates, checkpoints and log")
    log = _train(args, asked)
    from accelerate import PartialState

    if PartialState().is_main_process:
        first, last = log[0]["loss"], log[-1]["loss"]
        print(json.dumps({"out": str(args.out), **log[-1]}) if args.json else f"{args.out}: loss {first:.3f} -> {last:.3f}")
    return 0


def _own_terms(lesson: Any) -> list[str]:
    """The terms of a lesson that names none: all that it has words for, or collages alone where no LoRA has own prompts."""
    taught = {"single": lesson.singles, "composed": lesson.composed, "collage": lesson.parts}
    return ["collage"] if lesson.parts and not lesson.singles else [name for name, words in taught.items() if words]


def _train(args: argparse.Namespace, asked: Mapping[str, Any]) -> list[dict]:
    from mole_diffusers.mixture import attach
    from mole_diffusers.training.card import push, write_card
    from mole_diffusers.training.config import GateTraining
    from mole_diffusers.training.loop import train_gates
    from mole_diffusers.training.study import Lesson

    lesson = Lesson(**asked["lesson"])
    terms = asked["training"].get("terms") or dict.fromkeys(_own_terms(lesson), 1.0)
    config = GateTraining.from_dict({**asked["training"], "terms": terms})
    args.base, args.expert = asked["base"], [f"{name}={file}" for name, file in asked["experts"].items()]
    experts, gates = chosen_experts(args, " ".join(lesson.composed)), GateConfig.from_dict(asked["gates"])
    pipe = pipeline(args.base, args.device or own_device(), half=False)
    pipe.set_progress_bar_config(disable=True)
    mixture = attach(pipe, experts, gates)
    lesson.samples = samples(pipe, asked["data"])
    log = train_gates(
        pipe, mixture, lesson, config=config, clip=_clip(pipe, asked), folder=args.out, resume_from=args.resume,
        success=_emoji_success() if args.base == "emoji" and config.validation.every else None,
    )  # fmt: skip
    if is_main_process():
        write_card(args.out, mixture, lesson, base=args.base, config=config, log=log)
        if args.push_to_hub:
            push(args.out, args.push_to_hub)
    return log


def _clip(pipe: Any, asked: Mapping[str, Any]) -> Any:
    from mole_diffusers import emoji
    from mole_diffusers.training.clip import read_clip

    source = asked["clip"] or ("emoji" if asked["base"] == "emoji" else None)
    if source is None:
        return None
    own = source == "emoji"
    folder = emoji.default_folder() / "clip" if own else source
    return read_clip(folder, device=pipe.device, tokenizer=pipe.tokenizer if own else None)


def _emoji_success() -> Any:
    """The embedded world's judge: every subject of the prompt is there, in the prompt's style."""
    from mole_diffusers import emoji
    from mole_diffusers.emoji.judge import Judge

    judge = Judge.load(emoji.default_folder() / "judge")

    def success(images: Any, prompt: str) -> float:
        words, verdict = f" {prompt} ", judge.verdict(images)
        right = judge.sees(verdict, [s for s in judge.subjects if f" {s} " in words]).all(-1)
        return float((right & judge.is_style(verdict, prompt.partition(" drawing")[0])).float().mean())

    return success
