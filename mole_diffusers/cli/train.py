"""`mole train` and `mole train-lora`: gates for a set of LoRAs, and a LoRA from pictures.

A file can hold every setting of a run; options override it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, make_dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from typer import Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import experts_for, grouped_values, json_or_text, named_values, pipeline
from mole_diffusers.cli.console import note
from mole_diffusers.cli.options import NONE, WORLD
from mole_diffusers.options import check_kinds, check_options
from mole_diffusers.training.config import GateTraining, LoraTraining

if TYPE_CHECKING:
    from mole_diffusers.training.data import Samples

PICTURES, UPDATES = "What to learn from", "How to train"  # panels of the help
CLASS = "Prior preservation: pictures of the class, which the base shall go on drawing as it does"
RECOMMENDED = "factors"  # what validation compositions chose, see docs/training.md
learn = partial(Option, rich_help_panel=PICTURES)
gate = partial(Option, rich_help_panel="Which gates")
switch = partial(gate, parser=json_or_text, metavar="true|false")
class_picture = partial(Option, rich_help_panel=CLASS)

# ---- what both commands share


class Run:
    """What is trained on, and where it is written."""

    base: Annotated[str | None, Option(**options.BASE, show_default=WORLD)] = None
    base_config: options.BaseConfig = None
    device: options.Device = None
    out: Annotated[Path | None, Option(metavar="FOLDER", help="The result, checkpoints and the log go here.")] = None
    config: Annotated[Path | None, Option(metavar="FILE", help="Any settings as YAML or JSON; options override it.")] = None
    write_config: Annotated[Path | None, Option(metavar="FILE", help="Write all settings as YAML or JSON, and stop.")] = None
    resume: Annotated[
        str | None,
        Option(metavar="latest|checkpoint-N", help="Go on with the run in --out; latest also starts a new one."),
    ] = None


EVERY_RUN = {  # settings that both trainings have -> help
    "steps": "Updates.",
    "precision": "Of the forward pass; no is the full one.",
    "accumulation": "Compute a batch in so many parts, for less memory.",
    "checkpointing": "Less memory, more time.",
    "every": "Updates between checkpoints.",
    "keep": "How many checkpoints are kept.",
}


def updates(config: type, **helps: str) -> type:
    """A group of options for fields of a config, each with its help; the default is shown, unless the help tells it."""
    kinds, fields = get_type_hints(config), []
    for name, text in (helps | EVERY_RUN).items():
        default, flag = getattr(config, name), kinds[name] is bool
        shown = False if default is None or flag or "Default:" in text else str(default)
        option = Option(*[f"--{name}"] if flag else [], help=text, show_default=shown, rich_help_panel=UPDATES)
        fields.append((name, Annotated[kinds[name] | None, option], None))
    return make_dataclass("Learning", fields)


def settings(
    run: options.Given, sections: Mapping[str, options.Given], data: Sequence[str], **others: str | None
) -> dict[str, Any]:
    """Everything that was asked, as plain data: what the file of --config says, overridden by the options.

    Args:
        run: options of `Run`.
        sections: name -> what options say of it.
        data: folders of pictures.
        others: what else a file may hold beside sections.

    Raises ValueError for a file that is neither YAML nor JSON, or with an unknown section or one of another kind.
    """
    alone = {"base": run["base"], "base_config": run["base_config"], "data": data, **others}
    kinds = dict.fromkeys(("base", "base_config", *others), str) | dict.fromkeys(sections, Mapping[str, Any])
    file = _read(run["config"], kinds | {"data": Sequence[str]}) if run["config"] else {}
    merged = {name: file.get(name, {}) | given(section) for name, section in sections.items()}
    return {"base": WORLD, "data": [], **dict.fromkeys(others)} | file | merged | given(alone)


def _read(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a file that are not empty."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML, of which JSON is a part, but for numbers as 1e-3, which YAML 1.1 takes for text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        found = yaml.load(path.read_text(), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold sections of {list(kinds)}")
    found = {name: value for name, value in found.items() if value is not None}
    check_options(found, kinds, str(path))
    return found


def write_settings(path: Path, asked: Mapping[str, Any]) -> None:
    """Write what --config reads: JSON where the file is named so, else YAML."""
    import yaml

    as_json = path.suffix == ".json"
    path.write_text(json.dumps(asked, indent=2) + "\n" if as_json else yaml.safe_dump(asked, sort_keys=False))


def given(values: options.Given) -> dict[str, Any]:
    """What was given of the options of a section."""
    return {name: value for name, value in values.items() if value is not None and value not in ([], {})}


def samples(pipe: Any, folders: Sequence[str], *, prompt: str | None = None, side: int | None = None) -> Samples | None:
    """The pictures of folders as the pipeline's latents, cut to squares of `side` pixels; None without folders.

    Args:
        prompt: caption of pictures that have none.
        side: by default the pipeline's own.
    """
    from mole_diffusers.training.data import default_side, encode, read_folder, square

    pairs = [pair for folder in folders for pair in zip(*read_folder(folder, prompt=prompt), strict=True)]
    if not pairs:
        return None
    images, captions = zip(*pairs, strict=True)
    side = default_side(pipe) if side is None else side
    return encode(pipe, [square(image, side) for image in images], captions)


def trained_pipeline(asked: Mapping[str, Any], device: str | None) -> Any:
    """The base in full precision, by default on the GPU of this process, which `accelerate launch` numbers."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    own = f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None
    return pipeline(asked["base"], device or own, config=asked.get("base_config"), dtype="float32", offload="none")


def is_main_process() -> bool:
    """Whether this process writes what all of them made; MPICH and Open MPI number processes under names of their own."""
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


@contextmanager
def says_what_is_kept(folder: Path) -> Iterator[None]:
    """Say on stderr, where the block is interrupted by Ctrl-C, which checkpoint is there and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        from mole_diffusers.training.engine import checkpoints

        if is_main_process():
            whole = checkpoints(folder)
            kept = f"{whole[-1]} is kept; --resume latest goes on from there" if whole else "there is no checkpoint yet"
            print(file=sys.stderr)  # after the line of the bar
            note(f"interrupted: {kept}")
        raise


# ---- gates


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


GateUpdates = updates(
    GateTraining,
    width="Pixels of pictures of --prompt. Default: the model's own.",
    height="Likewise.",
    batch="Examples per update and term, over all processes.",
    lr="Learning rate. Default: what suits each gate.",
    schedule="Of the learning rate.",
    warmup="First updates, in which the learning rate grows.",
    weight_decay="Of AdamW.",
    max_norm="Gradients are clipped to this length; 0 does not clip.",
    ema="Keep a moving average of the gates with this decay, 0.99 say.",
    drop="Chance of each LoRA to sit out an update.",
    initial="Weights before the first update.",
    seed="The same seed gives the same gates.",
    tracker="tensorboard or wandb.",
)


@options.takes(run=Run, training=GateUpdates, gates=Gates)
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
    check_kinds(asked["experts"], dict.fromkeys(asked["experts"], str), "the experts")
    if validate is not None:
        looks = asked["training"].get("validation", {})
        check_kinds({"validation": looks}, {"validation": Mapping[str, Any]}, "the training")
        asked["training"]["validation"] = {**looks, "every": validate}
    if run["write_config"]:
        write_settings(run["write_config"], asked)
        return
    if run["out"] is None:
        raise ValueError("--out is needed: the folder for gates, checkpoints and log")
    with says_what_is_kept(run["out"]):
        log = _train_gates(asked, run, push_to_hub)
    if is_main_process():
        facts, first, last = {"out": str(run["out"]), **log[-1]}, log[0]["loss"], log[-1]["loss"]
        print(json.dumps(facts) if as_json else f"{run['out']}: loss {first:.3f} -> {last:.3f}")


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


def _train_gates(asked: Mapping[str, Any], run: options.Given, repo: str | None) -> list[dict]:
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
    pipe, out = trained_pipeline(asked, run["device"]), run["out"]
    mixture = attach(pipe, experts, gates)
    data = replace(data, samples=samples(pipe, asked["data"]))
    clip = read_clip(asked["clip"], device=pipe.device) if asked["clip"] else None
    where: dict[str, Any] = {"folder": out, "resume_from": run["resume"]}
    log = train_gates(pipe, mixture, data, config=config, clip=clip, success=success, **where)
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


# ---- a LoRA


class Concept:
    """What the LoRA is to learn."""

    trigger: Annotated[str | None, learn(metavar="WORDS", help="What will call the concept.")] = None
    prompt: Annotated[str | None, learn(help="Caption of pictures without one. Default: the trigger.")] = None
    resolution: Annotated[
        int | None, learn(metavar="PIXELS", help="Pictures are cut to squares of this side. Default: the base's own.")
    ] = None
    format: Annotated[
        Literal["diffusers", "kohya"] | None, learn(help="kohya is for A1111 and ComfyUI.", show_default="diffusers")
    ] = None


class Prior:
    """Pictures of the class, for prior preservation."""

    prior_prompt: Annotated[str | None, class_picture(help="What the base draws: 'a photo of a dog'.")] = None
    prior_data: Annotated[list[str], class_picture(metavar="FOLDER", help="Or pictures of your own. Repeatable.")] = NONE
    prior_count: Annotated[int | None, class_picture(metavar="N", help="Pictures to draw.", show_default="64")] = None
    prior_steps: Annotated[int | None, class_picture(metavar="N", help="Steps of the sampler.", show_default="25")] = None
    prior_guidance: Annotated[
        float | None, class_picture(metavar="SCALE", help="How strictly the prompt is followed.", show_default="7.5")
    ] = None


LoraUpdates = updates(
    LoraTraining,
    rank="Size of the LoRA.",
    alpha="Scale times rank. Default: the rank.",
    batch="Pictures per update, over all processes.",
    lr="Learning rate.",
    text_lr="Learning rate of the text encoder; 0 leaves it alone.",
    beam="Let ranks compete (BeamLoRA); from rank 8 on.",
    seed="The same seed gives the same LoRA.",
)


@options.takes(run=Run, concept=Concept, prior=Prior, training=LoraUpdates)
def train_lora(
    data: Annotated[list[str], learn(metavar="FOLDER", help="Pictures, with captions or without. Repeatable.")] = NONE,
    prior_weight: Annotated[
        float | None, class_picture(metavar="WEIGHT", help="How much they count.", show_default=str(LoraTraining.prior))
    ] = None,
    layers: Annotated[
        list[str],
        Option(
            metavar="KIND",
            help="Which layers: attention, feed-forward, convolution. Repeatable. Default: attention.",
            rich_help_panel=UPDATES,
        ),
    ] = NONE,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    run: options.Given,
    concept: options.Given,
    prior: options.Given,
    training: options.Given,
) -> None:
    """Teach a base one concept from pictures. The result is an ordinary LoRA file, named as the folder --out.

    `accelerate launch -m mole_diffusers train-lora` divides the work over GPUs.
    """
    prior = {name.removeprefix("prior_"): value for name, value in prior.items()}
    training = {**training, "layers": layers, "prior": prior_weight}
    asked = settings(run, {"concept": concept, "prior": prior, "training": training}, data)
    check_options(asked["concept"], get_type_hints(Concept), "the concept")
    check_options(asked["prior"], {n.removeprefix("prior_"): kind for n, kind in get_type_hints(Prior).items()}, "the prior")
    config = LoraTraining.from_dict(asked["training"])
    if run["write_config"]:
        write_settings(run["write_config"], asked)
        return
    if run["out"] is None or not asked["data"] or not asked["concept"].get("trigger"):
        raise ValueError("--out (a folder), --data (a folder of pictures) and --trigger (the concept's words) are needed")
    if asked["prior"] and not asked["prior"].get("data") and not asked["prior"].get("prompt"):
        raise ValueError("--prior-prompt is needed: what the base is to draw for prior preservation")
    with says_what_is_kept(run["out"]):
        facts = _train_lora(asked, config, run)
    if is_main_process():
        print(json.dumps(facts) if as_json else f"{facts['file']}: trigger {asked['concept']['trigger']!r}")


def _train_lora(asked: Mapping[str, Any], config: LoraTraining, run: options.Given) -> dict[str, Any]:
    from mole_diffusers.training import train_lora as fit

    concept, out = asked["concept"], run["out"]
    pipe, trigger, side = trained_pipeline(asked, run["device"]), concept["trigger"], concept.get("resolution")
    pictures: Any = samples(pipe, asked["data"], prompt=concept.get("prompt") or trigger, side=side)
    if mute := [caption for caption in pictures.captions if trigger not in caption]:
        warnings.warn(f"the caption {mute[0]!r} lacks the trigger {trigger!r}, {len(mute)} do", stacklevel=2)
    prior = _prior(pipe, asked["prior"], out if is_main_process() else None, side=side, seed=config.seed)
    tensors = fit(pipe, pictures, config, prior=prior, name=out.name, folder=out, resume_from=run["resume"])
    path = out / f"{out.name}.safetensors"
    if is_main_process():
        _save(pipe, tensors, path, config, concept=concept, pictures=len(pictures.captions))
    return {"file": str(path), "trigger": trigger, "pictures": len(pictures.captions), "rank": config.rank}


def _prior(pipe: Any, asked: Mapping[str, Any], folder: Path | None, *, side: int | None, seed: int) -> Any:
    """Pictures of the class: the user's, else those that the base draws, else none."""
    from mole_diffusers.training import class_samples

    options = dict(asked)
    prompt, folders = options.pop("prompt", None), options.pop("data", [])
    if folders:
        return samples(pipe, folders, prompt=prompt, side=side)
    return class_samples(pipe, prompt, seed=seed, folder=folder, **options) if prompt else None


def _save(pipe: Any, tensors: Any, path: Path, config: LoraTraining, *, concept: Mapping[str, Any], pictures: int) -> None:
    from mole_diffusers.training.lora_adapter import header, save_lora

    format: Any = concept.get("format") or "diffusers"
    alpha = config.alpha if format == "kohya" else config.rank  # else it is folded into the weights
    about = header(pipe, title=path.stem, rank=config.rank, alpha=alpha, pictures=pictures)
    about["mole.training"] = json.dumps({name: str(value) for name, value in asdict(config).items()})
    save_lora(tensors, path, alpha=config.alpha, triggers=concept["trigger"], about=about, format=format)
