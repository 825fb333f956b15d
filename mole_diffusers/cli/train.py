"""`mole train`: train gates for a set of LoRAs. A file can hold every setting; options override it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import experts_for, grouped_values, json_or_text, named_values
from mole_diffusers.cli.options import NONE, WORLD
from mole_diffusers.cli.training_runs import (
    PICTURES,
    UPDATES,
    Run,
    is_main_process,
    samples,
    settings,
    trained_pipeline,
    updates,
    write_settings,
)
from mole_diffusers.options import check_options
from mole_diffusers.training.config import GateTraining

RECOMMENDED = "factors"  # what validation compositions chose, see docs/training.md
learn = partial(Option, rich_help_panel=PICTURES)
gate = partial(Option, rich_help_panel="Which gates")
switch = partial(gate, parser=json_or_text, metavar="true|false")


class Gates:
    """Fields of `GateConfig`, which needs torch."""

    family: Annotated[
        str | None, gate(help="factors, flow, mole, static, prompt, rank, retrieval.", show_default=RECOMMENDED)
    ] = None
    granularity: Annotated[str | None, gate(help="static, mole: one gate per model, block, layer or matrix.")] = None
    total: Annotated[str | None, gate(help="What the weights add up to: 1, N, sigmoid, linear or none, by family.")] = None
    inputs: Annotated[str | None, gate(help="mole: reads the hidden state, or the experts' outputs.")] = None
    features: Annotated[str | None, gate(help="mole: reads tokens pooled or flattened.")] = None
    bias: Annotated[Any, switch(help="mole: adds a number per LoRA.")] = None
    bins: Annotated[int | None, gate(help="static: sets of weights over the noise levels.")] = None
    start: Annotated[str | None, gate(help="flow: weights before training: sum, mean or faithful.")] = None
    axis: Annotated[str | None, gate(help="prompt: shares among LoRAs (concept), layers (module) or both.")] = None
    top: Annotated[int | None, gate(help="prompt, rank: how many weigh something; 0 is all.")] = None
    rank: Annotated[int | None, gate(help="retrieval: rank of the router.")] = None
    scores: Annotated[str | None, gate(help="retrieval: weights per token or per image.")] = None
    partition: Annotated[int | None, gate(help="rank: ranks that share a weight; 0 is all of a LoRA.")] = None
    refactor: Annotated[Any, switch(help="rank: turn ranks to singular directions first.")] = None
    rate: Annotated[float | None, gate(help="rank: how fast the load is evened out.")] = None


Learning = updates(
    GateTraining,
    width="Pixels of pictures of --prompt. Default: the model's own.",
    height="Likewise.",
    batch="Examples per update and term, over all processes.",
    lr="Learning rate. Default: what suits each gate.",
    schedule="Of the learning rate: cosine, linear, constant, ...",
    warmup="First updates, in which the learning rate grows.",
    weight_decay="Of AdamW.",
    max_norm="Gradients are clipped to this length; 0 does not clip.",
    ema="Keep a moving average of the gates with this decay, 0.99 say.",
    drop="Chance of each LoRA to sit out an update.",
    initial="Weights before the first update: uniform, scalars or ssr.",
    seed="The same seed gives the same gates.",
    tracker="tensorboard or wandb.",
)


@options.takes(run=Run, training=Learning, gates=Gates)
def train(
    expert: options.Experts = NONE,
    push_to_hub: Annotated[str | None, Option(metavar="REPO", help="Upload the gates, with a model card.")] = None,
    as_json: options.Json = False,
    prompt: Annotated[list[str], learn(help="A prompt that names all LoRAs. Repeatable, as all of these are.")] = NONE,
    part: Annotated[list[str], learn(metavar="PROMPT", help="One subject of the --prompt, from left to right.")] = NONE,
    single: Annotated[list[str], learn(metavar="NAME=PROMPT", help="A prompt that names one LoRA alone.")] = NONE,
    style: Annotated[list[str], learn(metavar="NAME", help="A LoRA that is a style: it acts on the whole picture.")] = NONE,
    plain: Annotated[list[str], learn(metavar="PROMPT", help="A prompt that names no LoRA.")] = NONE,
    other: Annotated[list[str], learn(metavar="NAME=WORD", help="A word that may replace this LoRA's trigger.")] = NONE,
    data: Annotated[list[str], learn(metavar="FOLDER", help="Pictures with captions.")] = NONE,
    clip: Annotated[str | None, learn(metavar="MODEL", help="A CLIP of transformers, a folder or a hub id.")] = None,
    term: Annotated[
        list[str],
        Option(
            metavar="NAME[=WEIGHT][,OPTION=VALUE]",
            help="A goal: collage, single, composed, base, separate, denoise, clip, rollout, balance. "
            "Repeatable. Default: collage where there are parts, else what there are prompts for.",
            rich_help_panel=UPDATES,
        ),
    ] = NONE,
    validate: Annotated[
        int | None, Option(metavar="N", help="Draw the prompts every N updates.", rich_help_panel=UPDATES)
    ] = None,
    verbose: options.Verbose = False,
    *,
    run: options.Given,
    training: options.Given,
    gates: options.Given,
) -> None:
    """Train gates for a set of LoRAs: how much each one acts, where and when.

    Prompts are enough: the LoRAs themselves are the teachers. Without --expert, those of the emoji world that the prompts
    name are taken. `accelerate launch -m mole_diffusers train` divides the work over GPUs.
    """
    lesson = {
        "composed": prompt,
        "plain": plain,
        "styles": style,
        "singles": grouped_values(single, "--single"),
        "others": grouped_values(other, "--other"),
        "parts": _parts(prompt, part),
    }
    experts, terms = named_values(expert, "--expert"), dict(map(_term, term))
    sections = {"experts": experts, "gates": gates, "lesson": lesson, "training": {**training, "terms": terms}}
    asked = settings(run, sections, data, clip=clip)
    asked["gates"] = {"family": RECOMMENDED, **asked["gates"]}
    check_options(asked["experts"], dict.fromkeys(asked["experts"], str), "the experts")
    if validate is not None:
        drawn = {"validation": asked["training"].get("validation", {})}
        check_options(drawn, {"validation": Mapping[str, Any]}, "the training")
        asked["training"]["validation"] = drawn["validation"] | {"every": validate}
    if run["write_config"]:
        write_settings(run["write_config"], asked)
        return
    out = run["out"]
    if out is None:
        raise ValueError("--out is needed: the folder for gates, checkpoints and log")
    log = _train(asked, run["device"], out, resume=run["resume"], repo=push_to_hub)
    if is_main_process():
        first, last = log[0]["loss"], log[-1]["loss"]
        print(json.dumps({"out": str(out), **log[-1]}) if as_json else f"{out}: loss {first:.3f} -> {last:.3f}")


def _parts(prompts: Sequence[str], parts: Sequence[str]) -> dict[str, list[str]]:
    if parts and len(prompts) != 1:
        raise ValueError(f"--part tells the subjects of one --prompt, got {len(prompts)} prompts")
    return {prompts[0]: list(parts)} if parts else {}


def _term(text: str) -> tuple[str, Any]:
    """NAME[=WEIGHT][,OPTION=VALUE] -> (name, its settings)."""
    first, *rest = re.split(r",(?![^\[]*\])", text)  # not at the commas of a list, as in lengths=[20,50]
    name, _, weight = first.partition("=")
    return name, {"weight": json_or_text(weight or "1")} | {
        k: json_or_text(v) for k, v in named_values(rest, "--term").items()
    }


def _train(asked: Mapping[str, Any], device: str | None, out: Path, *, resume: str | None, repo: str | None) -> list[dict]:
    from mole_diffusers.gates import GateConfig, checkpoint, hub
    from mole_diffusers.mixture import attach
    from mole_diffusers.studio.names import is_hub_id
    from mole_diffusers.training import TrainingData, read_clip, train_gates
    from mole_diffusers.training.gate_trainer import summary

    base, data = asked["base"], TrainingData.from_dict(asked["lesson"])
    terms = asked["training"].get("terms") or dict.fromkeys(_own_terms(data), 1.0)
    config = GateTraining.from_dict({**_canvas(base, data), **asked["training"], "terms": terms})
    gates = GateConfig.from_dict(asked["gates"])
    prompts = [*data.composed, *chain(*data.parts.values(), *data.singles.values())]
    experts = experts_for(base, asked["experts"], " ".join(prompts))
    drawn = config.validation.prompts or data.composed
    success = _judge(drawn) if base == WORLD and config.validation.every else None
    pipe = trained_pipeline(asked, device)
    mixture = attach(pipe, experts, gates)
    data = replace(data, samples=samples(pipe, asked["data"]))
    clip = read_clip(asked["clip"], device=pipe.device) if asked["clip"] else None
    log = train_gates(pipe, mixture, data, config=config, clip=clip, folder=out, resume_from=resume, success=success)
    if is_main_process():
        known = base if is_hub_id(base) else None  # a folder of this machine tells nobody else
        prompt, about = next(iter(data.composed), None), summary(config, log)
        card = hub.model_card(mixture.weighed(), mixture.config, prompt=prompt, base=known, training=about)
        (out / hub.CARD).write_text(card)
        if repo:
            hub.upload(out, repo, allow_patterns=[checkpoint.WEIGHTS, checkpoint.CONFIG, hub.CARD])
    return log


def _own_terms(data: Any) -> list[str]:
    """The terms where none is named: collages where there are parts, else those that there are prompts for."""
    learned = {"single": data.singles, "composed": data.composed}
    return ["collage"] if data.parts else [name for name, prompts in learned.items() if prompts]


def _canvas(base: str, data: Any) -> dict[str, int]:
    """The size that the embedded world draws the composed prompts at; {} for other bases, which have one of their own."""
    from mole_diffusers import emoji

    sizes = [emoji.canvas(prompt) for prompt in data.composed[:1]] if base == WORLD else []
    return dict(zip(("width", "height"), sizes[0], strict=True)) if sizes else {}


def _judge(prompts: Sequence[str]) -> Callable[[Any, str], float]:
    """The embedded world's judge: every subject of the prompt is there, in the prompt's style.

    Raises ValueError for a prompt that names no subject of the world.
    """
    from mole_diffusers import emoji
    from mole_diffusers.emoji.judge import Judge

    judge, scenes = Judge.load(emoji.default_folder() / "judge"), {}
    for prompt in prompts:
        if (scene := emoji.scene_in(prompt)) is None:
            raise ValueError(f"the prompt {prompt!r} names no subject of the emoji world, so nothing can be judged")
        scenes[prompt] = scene
    return lambda images, prompt: float(judge.is_right(judge.verdict(images), scenes[prompt]).float().mean())
