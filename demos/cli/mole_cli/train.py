"""`mole train` and `mole train-lora`: train gates for a set of LoRAs, or a LoRA from pictures.

A file can hold all settings of a run; options override it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from typer import Option

from mole_app.studio.names import WORLD
from mole_cli import options
from mole_cli.commands import Given, Group, Result, settings_of
from mole_cli.common import experts_for, grouped_values, json_or_text, lora_files, named_values, once, opened
from mole_cli.console import note
from mole_cli.declared import declared
from mole_diffusers.options import check_kinds, check_options
from mole_diffusers.training import GateTraining, LoraTraining

if TYPE_CHECKING:
    from mole_diffusers.training import Samples

READ_BY = {  # an option of `mole train` -> the terms that learn from it
    "prompt": ("composed", "separate", "clip", "rollout"),
    "part": ("collage",),
    "single": ("single", "rollout"),
    "style": ("composed", "separate"),
    "plain": ("base",),
    "other": ("rollout",),
    "data": ("denoise", "clip"),
    "clip": ("clip", "rollout"),
    **dict.fromkeys(("width", "height"), ("composed", "separate", "collage", "rollout")),
}
NO_SETTINGS = ("out", "resume", "device", "push_to_hub")  # options that a file of settings does not hold

# ---- what both commands share


@dataclass
class RunOptions(options.Machine):
    """What to train on, and where to write the result.

    Attributes:
        base (MODEL): as in the other commands. Default: emoji.
        out (FOLDER): the result, checkpoints and the log go here.
        config (FILE): a YAML or JSON file with any settings; options override it.
        write_config (FILE): write the settings that you gave as YAML or JSON to a new file, and stop.
        resume (latest|checkpoint-N): continue the run in --out; latest also starts a new one.
    """

    base: str | None = None
    out: Path | None = None
    config: options.File = None
    write_config: Path | None = None
    resume: str | None = None


def settings(
    run: RunOptions, sections: Mapping[str, Mapping[str, Any]], data: Sequence[str], **others: str | None
) -> dict[str, Any]:
    """All settings as plain data: those of the --config file, overridden by the options.

    Args:
        sections: name -> the settings that options give.
        data: folders of pictures.
        others: the other keys that a file may hold, besides sections.

    Raises ValueError for a file that is neither YAML nor JSON, or a section that is unknown or of the wrong kind.
    """
    alone = {"base": run.base, "base_config": run.base_config, **others}
    kinds = {**dict.fromkeys(alone, str), **dict.fromkeys(sections, Mapping[str, Any]), "data": Sequence[str]}
    file = _read(run.config, kinds) if run.config else {}
    merged = {name: file.get(name, {}) | stated(section) for name, section in sections.items()}
    return {"base": WORLD, "data": [], **dict.fromkeys(others)} | file | merged | stated({**alone, "data": data})


def _read(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a file that are not empty."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML, which includes JSON. Numbers like 1e-3 are numbers, which YAML 1.1 takes for text, and keys come once."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            once(((str(self.construct_object(key)), None) for key, _ in node.value), f"{path}: the key")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        found = yaml.load(path.read_text("utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold sections of {list(kinds)}")
    found = {name: value for name, value in found.items() if value is not None}
    check_options(found, kinds, str(path))
    return found


def stated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not empty."""
    return {name: value for name, value in values.items() if value is not None and value not in ([], (), {})}


def samples(pipe: Any, folders: Sequence[str], *, prompt: str | None = None, side: int | None = None) -> Samples | None:
    """Pictures from folders as latents of the pipeline, cut to squares of `side` pixels; None without folders.

    Args:
        prompt: caption of pictures that have none.
        side: by default the pipeline's own size.
    """
    from mole_diffusers.training import default_side, encode, read_folder

    if not folders:
        return None
    side = default_side(pipe) if side is None else side
    pairs = [pair for folder in folders for pair in zip(*read_folder(folder, prompt=prompt, side=side), strict=True)]
    images, captions = zip(*pairs, strict=True)
    return encode(pipe, images, captions)


def trained_pipeline(asked: Mapping[str, Any], device: str | None) -> Any:
    """The base in full precision, by default on this process's GPU (`accelerate launch` numbers them).

    Raises ValueError for a base that cannot be trained on.
    """
    import torch

    from mole_diffusers.training import network

    rank = os.environ.get("LOCAL_RANK")
    own = f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None
    machine = options.Machine(device or own, asked.get("base_config"))
    pipe = opened(asked["base"], machine, dtype="float32", offload="none").pipe
    network(pipe)  # raises for a base that cannot be trained on
    return pipe


def is_main_process() -> bool:
    """Whether this process writes the shared result. MPICH and Open MPI use their own variables for process numbers."""
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def carried_out(run: RunOptions, asked: Mapping[str, Any], fit: Callable[[Path], Result], given: Given) -> Result | None:
    """Train with these settings, or write them for --write-config: as JSON if the file's name says so, else as YAML.

    If Ctrl-C interrupts it, a note on stderr says which checkpoint there is and how to continue.
    """
    import yaml

    from mole_diffusers.whole_files import only_run, write_text

    if run.write_config:
        if others := [f"--{name.replace('_', '-')}" for name in NO_SETTINGS if name in given]:
            note(f"the file does not hold {', '.join(others)}: give that again with --config")
        as_json = run.write_config.suffix == ".json"
        text = json.dumps(asked, indent=2) + "\n" if as_json else yaml.safe_dump(dict(asked), sort_keys=False)
        if run.write_config.exists():
            raise ValueError(f"{run.write_config} is there already; give --write-config another name, or delete it")
        write_text(run.write_config, text)
        return None
    from mole_diffusers.training import checkpoints, find_checkpoint

    if run.out is None:
        raise ValueError("--out is needed: the folder for the result, checkpoints and log")
    with only_run(run.out if run.out.exists() and is_main_process() else None):  # before anything is loaded or drawn
        find_checkpoint(run.out, run.resume)
    try:
        result = fit(run.out)
        return result if is_main_process() else None
    except KeyboardInterrupt:
        if is_main_process():
            whole = checkpoints(run.out)
            kept = f"{whole[-1]} is kept; --resume latest goes on from there" if whole else "there is no checkpoint yet"
            print(file=sys.stderr)  # below the progress bar
            note(f"interrupted: {kept}")
        raise


# ---- gates


FAMILIES: list[Any] = [
    family for family in declared("mole_diffusers/gates/families").values() if getattr(family, "learns", True)
]
KINDS = " ".join(f"{family.name}: {family.__doc__.partition(chr(10))[0]}" for family in FAMILIES)
RECOMMENDED = next(family.name for family in FAMILIES if getattr(family, "recommended", False))
if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(family.name for family in FAMILIES)]


@settings_of(*FAMILIES)
class GateOptions(Group):
    """Which gates: a family and its options."""

    panel = "Which gates"
    family: Annotated[Name | None, Option(help=f"{KINDS} Default: {RECOMMENDED}.")] = None


@dataclass
class Lesson(Group):
    """What gates learn from.

    Attributes:
        prompt: a prompt that names all LoRAs.
        part (PROMPT): one subject of the --prompt, from left to right.
        single (NAME=PROMPT): a prompt that names one LoRA alone.
        style (NAME): a LoRA that is a style: it acts on the whole picture.
        plain (PROMPT): a prompt that names no LoRA.
        other (NAME=WORD): a word that may replace this LoRA's trigger.
        data (FOLDER): pictures with captions.
        clip (MODEL): a CLIP of transformers, a folder or a hub id.
    """

    panel = "What to learn from"
    prompt: Sequence[str] = ()
    part: Sequence[str] = ()
    single: Sequence[str] = ()
    style: Sequence[str] = ()
    plain: Sequence[str] = ()
    other: Sequence[str] = ()
    data: Sequence[str] = ()
    clip: str | None = None


@settings_of(GateTraining, without=("terms", "validation"))
class GateUpdates(Group):
    """How gates are trained.

    Attributes:
        term (NAME[=WEIGHT][,OPTION=VALUE]): a goal: collage, single, composed, base, separate, denoise, clip, rollout,
            balance. Default: collage if you give --part, else the goals that your prompts allow.
        validate (N): draw the prompts every N updates.
    """

    panel = "How to train"
    term: Sequence[str] = ()
    validate: int | None = None


def train(
    expert: options.Experts = (),
    push_to_hub: str | None = None,
    *,
    run: RunOptions,
    lesson: Lesson,
    training: GateUpdates,
    gates: GateOptions,
    given: Given,
) -> Result | None:
    """Train gates for a set of LoRAs: how much each one acts, where and when.

    You only need prompts: the LoRAs themselves are the teachers. Without --expert, mole takes the LoRAs of the emoji
    world that the prompts name. `accelerate launch -m mole_cli train` divides the work over GPUs.

    Args:
        push_to_hub (REPO): upload the gates, with a model card.
    """
    learned = {
        "composed": lesson.prompt,
        "plain": lesson.plain,
        "styles": lesson.style,
        "singles": grouped_values(lesson.single, "--single"),
        "others": grouped_values(lesson.other, "--other"),
    }
    updates = {**vars(training), "terms": once(map(_term, training.term), "--term")}
    del updates["term"], updates["validate"]
    experts = named_values(expert, "--expert")
    sections = {"experts": experts, "gates": vars(gates), "lesson": learned, "training": updates}
    asked = settings(run, sections, lesson.data, clip=lesson.clip)
    if experts:
        asked["experts"] = experts  # not beside those of the file
    check_kinds(asked["experts"], dict.fromkeys(asked["experts"], str), "the experts")
    if not run.write_config:
        lora_files(asked["experts"])
    if training.validate is not None:
        looks = asked["training"].get("validation", {})
        check_kinds({"validation": looks}, {"validation": Mapping[str, Any]}, "the training")
        asked["training"]["validation"] = {**looks, "every": training.validate}
    GateTraining.from_dict(stated(asked["training"]))  # without the terms that prompts decide, and the size
    from mole_diffusers.gates import GateConfig
    from mole_diffusers.training import TrainingData

    if lesson.prompt or lesson.part:  # then parts in the file are of another prompt, or others
        asked["lesson"].pop("parts", None)
    if lesson.part:
        prompts = TrainingData.from_dict(asked["lesson"]).composed
        if len(prompts) != 1:
            raise ValueError(f"--part tells the subjects of one --prompt, got {len(prompts)} prompts")
        asked["lesson"]["parts"] = {prompts[0]: list(lesson.part)}
    asked["gates"] = {"family": RECOMMENDED, **asked["gates"]}
    data, family = TrainingData.from_dict(asked["lesson"]), GateConfig.from_dict(asked["gates"])
    return carried_out(run, asked, partial(_train_gates, asked, data, family, run, push_to_hub), given)


def _term(text: str) -> tuple[str, Any]:
    """NAME[=WEIGHT][,OPTION=VALUE] -> (name, its settings)."""
    first, *rest = re.split(r",(?![^\[]*\])", text)  # but not at commas inside a list, as in lengths=[20,50]
    name, _, weight = first.partition("=")
    named = {"weight": weight or "1", **named_values(rest, "--term")}
    return name, {key: json_or_text(value) for key, value in named.items()}


def _train_gates(asked: Mapping[str, Any], data: Any, gates: Any, run: RunOptions, repo: str | None, out: Path) -> Result:
    from mole_app.studio.names import is_hub_id
    from mole_diffusers import attach, denoiser
    from mole_diffusers.gates import CARD, GATE_CONFIG, GATE_WEIGHTS, model_card, upload
    from mole_diffusers.training import mean_losses, read_clip, save_weight_memory, summary, train_gates
    from mole_diffusers.whole_files import write_text

    base = asked["base"]
    terms = asked["training"].get("terms") or dict.fromkeys(_own_terms(data), 1.0)
    config = GateTraining.from_dict({**_canvas(base, data), **asked["training"], "terms": terms})
    there = {"part": data.parts, "style": data.styles, "plain": data.plain, "other": data.others}
    there |= {"data": asked["data"], "clip": asked["clip"]}
    there |= {"single": data.singles} if config.initial == "uniform" else {}  # other first weights need them
    if not config.validation.every:  # which draws them
        there |= {"prompt": [prompt for prompt in data.composed if prompt not in data.parts]}
        there |= {name: asked["training"].get(name) for name in ("width", "height")}
    unread = [name for name, value in there.items() if value and not set(READ_BY[name]) & set(config.parsed)]
    if unread and is_main_process():
        needed = ", ".join(f"--{name} (--term {' or '.join(READ_BY[name])})" for name in unread)
        note(f"nothing is learned from {needed}; the terms are {', '.join(config.parsed)}")
    prompts = [*data.composed, *chain(*data.parts.values(), *data.singles.values())]
    experts = experts_for(base, asked["experts"], " ".join(prompts))
    drawn = config.validation.prompts or data.composed
    success = _judge(drawn) if base == WORLD and config.validation.every else None
    pipe = trained_pipeline(asked, run.device)
    save_weight_memory(denoiser(pipe), config.precision)
    mixture = attach(pipe, experts, gates)
    data = replace(data, samples=None if "data" in unread else samples(pipe, asked["data"]))
    clip = read_clip(asked["clip"], device=pipe.device) if asked["clip"] and "clip" not in unread else None
    where: dict[str, Any] = {"folder": out, "resume_from": run.resume}
    log = train_gates(pipe, mixture, data, config=config, clip=clip, success=success, **where)
    if is_main_process():
        known = base if is_hub_id(base) else None  # a local folder means nothing to others
        prompt, about = next(iter(data.composed), None), summary(config, log)
        card = model_card(mixture.weighed(), mixture.config, prompt=prompt, base=known, training=about)
        write_text(out / CARD, card)
        if repo:
            upload(out, repo, allow_patterns=[GATE_WEIGHTS, GATE_CONFIG, CARD])
    first, last = mean_losses(log)
    words = f"{out}: loss {first['loss']:.3f} -> {last['loss']:.3f}, means over a tenth of the updates"
    words += f"; success in validation {last['success']:.2f}" if "success" in last else ""
    return Result({"out": str(out), "updates": len(log), **last}, words)


def _own_terms(data: Any) -> list[str]:
    """The terms if none is named: collages if there are parts, else those that there are prompts for."""
    learned = {"single": data.singles, "composed": data.composed}
    return ["collage"] if data.parts else [name for name, prompts in learned.items() if prompts]


def _canvas(base: str, data: Any) -> dict[str, int]:
    """The largest size at which the emoji world draws a composed prompt; {} for other bases, which have their own."""
    import mole_world

    sizes = [mole_world.canvas(prompt) for prompt in data.composed] if base == WORLD else []
    return {"width": max(w for w, _ in sizes), "height": max(h for _, h in sizes)} if sizes else {}


def _judge(prompts: Sequence[str]) -> Callable[[Any, str], float]:
    """The emoji world's judge: every subject of the prompt is there, in the prompt's style.

    Raises ValueError for a prompt that names no subject of that world.
    """
    import mole_world
    from mole_world.judge import Judge

    judge, scenes = Judge.load(mole_world.default_folder() / "judge"), {}
    for prompt in prompts:
        if (scene := mole_world.scene_in(prompt)) is None:
            raise ValueError(f"the prompt {prompt!r} names no subject of the emoji world, so nothing can be judged")
        scenes[prompt] = scene
    return lambda images, prompt: float(judge.is_right(judge.verdict(images), scenes[prompt]).float().mean())


# ---- a LoRA


@dataclass
class ConceptOptions(Group):
    """What the LoRA should learn.

    Attributes:
        trigger (WORDS): the words that will call the concept.
        prompt: caption of pictures without one. Default: the trigger.
        resolution (PIXELS): pictures are cut to squares of this side. Default: the base's own.
        format: kohya is for A1111 and ComfyUI. Default: diffusers.
    """

    panel = "What to learn from"
    trigger: str | None = None
    prompt: str | None = None
    resolution: int | None = None
    format: Literal["diffusers", "kohya"] | None = None


@dataclass
class Prior(Group):
    """Pictures of the class, for prior preservation.

    Attributes:
        prompt: what the base draws: 'a photo of a dog'.
        data (FOLDER): your own pictures of the class, instead of drawn ones.
        count (N): pictures to draw. Default: 64.
        steps (N): steps of the sampler. Default: 25.
        guidance (SCALE): how strictly to follow the prompt. Default: 7.5.
    """

    panel = "Prior preservation: pictures that keep the class as the base draws it"
    prefix = "prior_"
    prompt: str | None = None
    data: Sequence[str] = ()
    count: int | None = None
    steps: int | None = None
    guidance: float | None = None


@settings_of(LoraTraining, without=("prior",))
class LoraUpdates(Group):
    """How it is trained."""

    panel = "How to train"


def train_lora(
    data: Sequence[str] = (),
    prior_weight: float | None = None,
    *,
    run: RunOptions,
    concept: ConceptOptions,
    prior: Prior,
    training: LoraUpdates,
    given: Given,
) -> Result | None:
    """Teach a base one concept from pictures. The result is an ordinary LoRA file, named after the folder --out.

    `accelerate launch -m mole_cli train-lora` divides the work over GPUs.

    Args:
        data (FOLDER): pictures, with or without captions.
        prior_weight (WEIGHT): how much pictures of the class count. Default: 1.
    """
    updates = {**vars(training), "prior": prior_weight}
    asked = settings(run, {"concept": vars(concept), "prior": vars(prior), "training": updates}, data)
    for section, group in (("concept", ConceptOptions), ("prior", Prior)):
        check_options(asked[section], get_type_hints(group), f"the {section}")
    drawn = [f"--prior-{name}" for name in ("count", "steps", "guidance") if name in asked["prior"]]
    if drawn and asked["prior"].get("data"):
        raise ValueError(f"--prior-data is pictures of the class, and none are drawn: leave out {', '.join(drawn)}")
    folders = [*asked["data"], *asked["prior"].get("data", [])]
    if not run.write_config and (gone := [folder for folder in folders if not Path(folder).is_dir()]):
        raise ValueError(f"there is no folder {gone[0]} with pictures")
    config = LoraTraining.from_dict(asked["training"])
    return carried_out(run, asked, partial(_train_lora, asked, config, run), given)


def _train_lora(asked: Mapping[str, Any], config: LoraTraining, run: RunOptions, out: Path) -> Result:
    from mole_diffusers.training import (
        check_batch,
        class_samples,
        header,
        join_processes,
        save_lora,
        save_weight_memory,
        unet_of,
    )
    from mole_diffusers.training import train_lora as fit

    concept = asked["concept"]
    if not asked["data"] or not (trigger := concept.get("trigger")):
        raise ValueError("--data (a folder of pictures) and --trigger (the concept's words) are needed")
    wanted = asked["prior"] or asked["training"].get("prior") is not None
    if wanted and not asked["prior"].get("data") and not asked["prior"].get("prompt"):
        raise ValueError("--prior-prompt is needed: what the base is to draw for prior preservation")
    pipe, side = trained_pipeline(asked, run.device), concept.get("resolution")
    unet_of(pipe, "training a LoRA")
    check_batch(config.batch, join_processes(pipe.device), config.accumulation, "the batch")
    pictures: Any = samples(pipe, asked["data"], prompt=concept.get("prompt") or trigger, side=side)
    if mute := [caption for caption in pictures.captions if trigger not in caption]:
        warnings.warn(f"the caption {mute[0]!r} lacks the trigger {trigger!r}, {len(mute)} do", stacklevel=2)
    drawing = dict(asked["prior"])
    of_class, folders = drawing.pop("prompt", None), drawing.pop("data", [])
    prior = samples(pipe, folders, prompt=of_class, side=side)
    if of_class and prior is None:
        prior = class_samples(pipe, of_class, seed=config.seed, folder=out if is_main_process() else None, **drawing)
    save_weight_memory(pipe.unet, config.precision)  # the class was drawn in full precision
    name = Path(os.path.abspath(out)).name  # "." has a name, and a link keeps its own
    tensors = fit(pipe, pictures, config, prior=prior, name=name, folder=out, resume_from=run.resume)
    path, count = out / f"{name}.safetensors", len(pictures.captions)
    format: Any = concept.get("format") or "diffusers"
    if is_main_process():
        alpha = config.alpha if format == "kohya" else config.rank  # otherwise it is folded into the weights
        about = header(pipe, title=name, rank=config.rank, alpha=alpha, pictures=count)
        about["mole.training"] = json.dumps({key: str(value) for key, value in asdict(config).items()})
        save_lora(tensors, path, alpha=config.alpha, triggers=trigger, about=about, format=format)
    facts = {"file": str(path), "trigger": trigger, "pictures": count, "rank": config.rank}
    return Result(facts, f"{path}: trigger {trigger!r}")
