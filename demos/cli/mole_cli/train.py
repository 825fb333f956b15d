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
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from mole_app.studio.names import WORLD
from mole_cli import options
from mole_cli.common import experts_for, grouped_values, json_or_text, lora_files, named_values, once, opened
from mole_cli.console import note, show
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

PRESERVING = "Prior preservation: pictures that keep the class as the base draws it"  # the heading of its options
GATES = (  # options that say which gates
    "gate_type", "start", "granularity", "total", "inputs", "features", "bias", "area", "axis", "top", "partition",
    "refactor", "rate", "rank", "scores", "bins",
)  # fmt: skip
GATE_UPDATES = [field.name for field in fields(GateTraining) if field.name not in ("terms", "validation")]
CONCEPT = {  # options of `mole train-lora` that say what to learn, and those of the prior: name -> kind
    "trigger": str | None,
    "prompt": str | None,
    "resolution": int | None,
    "format": Literal["diffusers", "kohya"] | None,
}
PRIOR = {
    "prompt": str | None,
    "data": Sequence[str],
    "count": int | None,
    "steps": int | None,
    "guidance": float | None,
}

# ---- what both commands share


def settings(
    run: SimpleNamespace, sections: Mapping[str, Mapping[str, Any]], data: Sequence[str], **others: str | None
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
    how = {"device": device or own, "base_config": asked.get("base_config"), "dtype": "float32", "offload": "none"}
    pipe = opened(asked["base"], how).pipe
    network(pipe)  # raises for a base that cannot be trained on
    return pipe


def is_main_process() -> bool:
    """Whether this process writes the shared result. MPICH and Open MPI use their own variables for process numbers."""
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def carried_out(run: SimpleNamespace, asked: Mapping[str, Any], fit: Callable[[Path], tuple[Any, str]]) -> None:
    """Train with these settings, or write them for --write-config: as JSON if the file's name says so, else as YAML.

    If Ctrl-C interrupts it, a note on stderr says which checkpoint there is and how to continue.
    """
    import yaml

    from mole_diffusers.whole_files import only_run, write_text

    if run.write_config:
        if others := [f"--{name.replace('_', '-')}" for name in NO_SETTINGS if getattr(run, name, None) is not None]:
            note(f"the file does not hold {', '.join(others)}: give that again with --config")
        as_json = run.write_config.suffix == ".json"
        text = json.dumps(asked, indent=2) + "\n" if as_json else yaml.safe_dump(dict(asked), sort_keys=False)
        if run.write_config.exists():
            raise ValueError(f"{run.write_config} is there already; give --write-config another name, or delete it")
        write_text(run.write_config, text)
        return
    from mole_diffusers.training import checkpoints, find_checkpoint

    if run.out is None:
        raise ValueError("--out is needed: the folder for the result, checkpoints and log")
    with only_run(run.out if run.out.exists() and is_main_process() else None):  # before anything is loaded or drawn
        find_checkpoint(run.out, run.resume)
    try:
        facts, words = fit(run.out)
    except KeyboardInterrupt:
        if is_main_process():
            whole = checkpoints(run.out)
            kept = f"{whole[-1]} is kept; --resume latest goes on from there" if whole else "there is no checkpoint yet"
            print(file=sys.stderr)  # below the progress bar
            note(f"interrupted: {kept}")
        raise
    if is_main_process():
        show(facts, words, as_json=run.as_json)


# ---- gates


def train(
    expert: options.Experts = [],
    push_to_hub: Annotated[str | None, Option(metavar="REPO", help="upload the gates, with a model card.")] = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    base: options.TrainedBase = None,
    out: options.RunFolder = None,
    config: options.Config = None,
    write_config: options.WriteConfig = None,
    resume: options.Resume = None,
    prompt: Annotated[
        list[str], Option(rich_help_panel="What to learn from", help="a prompt that names all LoRAs. Repeatable.")
    ] = [],
    part: Annotated[
        list[str],
        Option(
            metavar="PROMPT",
            rich_help_panel="What to learn from",
            help="one subject of the --prompt, from left to right. Repeatable.",
        ),
    ] = [],
    single: Annotated[
        list[str],
        Option(
            metavar="NAME=PROMPT",
            rich_help_panel="What to learn from",
            help="a prompt that names one LoRA alone. Repeatable.",
        ),
    ] = [],
    style: Annotated[
        list[str],
        Option(
            metavar="NAME",
            rich_help_panel="What to learn from",
            help="a LoRA that is a style: it acts on the whole picture. Repeatable.",
        ),
    ] = [],
    plain: Annotated[
        list[str],
        Option(metavar="PROMPT", rich_help_panel="What to learn from", help="a prompt that names no LoRA. Repeatable."),
    ] = [],
    other: Annotated[
        list[str],
        Option(
            metavar="NAME=WORD",
            rich_help_panel="What to learn from",
            help="a word that may replace this LoRA's trigger. Repeatable.",
        ),
    ] = [],
    data: Annotated[
        list[str], Option(metavar="FOLDER", rich_help_panel="What to learn from", help="pictures with captions. Repeatable.")
    ] = [],
    clip: Annotated[
        str | None,
        Option(metavar="MODEL", rich_help_panel="What to learn from", help="a CLIP of transformers, a folder or a hub id."),
    ] = None,
    term: Annotated[
        list[str],
        Option(
            metavar="NAME[=WEIGHT][,OPTION=VALUE]",
            show_default=False,
            rich_help_panel="How to train",
            help="a goal: collage, single, composed, base, separate, denoise, clip, rollout, balance. Default: collage if "
            "you give --part, else the goals that your prompts allow. Repeatable.",
        ),
    ] = [],
    validate: Annotated[
        int | None, Option(metavar="N", rich_help_panel="How to train", help="draw the prompts every N updates.")
    ] = None,
    steps: Annotated[
        int | None, Option(show_default="150", rich_help_panel="How to train", help="number of updates.")
    ] = None,
    batch: Annotated[
        int | None,
        Option(
            show_default="8",
            rich_help_panel="How to train",
            help="rows per term and update, over all processes and accumulated parts together.",
        ),
    ] = None,
    accumulation: options.Accumulation = None,
    seed: options.TrainingSeed = None,
    precision: options.Precision = None,
    checkpointing: options.Checkpointing = None,
    every: Annotated[
        int | None, Option(show_default="50", rich_help_panel="How to train", help="updates between checkpoints.")
    ] = None,
    keep: options.Keep = None,
    lr: Annotated[
        float | None,
        Option(
            show_default=False,
            rich_help_panel="How to train",
            help="AdamW's peak learning rate. Default: for each gate, what moves its logits by at most 0.05 in an update.",
        ),
    ] = None,
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts"] | None,
        Option(
            show_default="cosine", rich_help_panel="How to train", help="name of a diffusers schedule for the learning rate."
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        Option(show_default="0", rich_help_panel="How to train", help="number of first updates in which the rate grows."),
    ] = None,
    weight_decay: Annotated[
        float | None, Option(show_default="0.0", rich_help_panel="How to train", help="AdamW's weight decay.")
    ] = None,
    max_norm: Annotated[
        float | None,
        Option(show_default="1.0", rich_help_panel="How to train", help="clip gradients to this length; 0 does not clip."),
    ] = None,
    ema: Annotated[
        float | None,
        Option(
            show_default="0.0",
            rich_help_panel="How to train",
            help="decay of an exponential moving average of the gates, which then draws pictures and is saved; 0 "
            "means none. "
            "As in diffusers, update n decays by at most n / (n + 9), so 0.99 is reached at update 891.",
        ),
    ] = None,
    initial: Annotated[
        Literal["uniform", "scalars", "ssr"] | None,
        Option(
            show_default="uniform",
            rich_help_panel="How to train",
            help='the gates\' weights before the first update. "uniform": equal weights. "scalars": the best weights '
            "per gate "
            'on the experts\' own activations. "ssr": those nearest to SSR-Merge.',
        ),
    ] = None,
    drop: Annotated[
        float | None,
        Option(
            show_default="0.0",
            rich_help_panel="How to train",
            help="chance that each expert sits out an update, though never all of them (RAMoLE: 0.5).",
        ),
    ] = None,
    tracker: Annotated[
        str | None,
        Option(
            show_default=False,
            rich_help_panel="How to train",
            help='a tracker that Accelerate knows, "tensorboard" or "wandb". Default: none.',
        ),
    ] = None,
    width: Annotated[
        int | None,
        Option(
            show_default=False,
            rich_help_panel="How to train",
            help="pixels of the pictures of composed prompts. Default: the model's own size, which single prompts use.",
        ),
    ] = None,
    height: Annotated[
        int | None,
        Option(
            show_default=False,
            rich_help_panel="How to train",
            help="pixels of the pictures of composed prompts. Default: the model's own size, which single prompts use.",
        ),
    ] = None,
    gate_type: Annotated[
        Literal["factors", "flow", "mole", "outputs", "prompt", "rank", "retrieval", "static"] | None,
        Option(
            show_default=False,
            rich_help_panel="Which gates",
            help="factors: Learns a constant for each rank of each LoRA at every layer. flow: Reads the block's state token "
            "by token. mole: Reads the block's state as a whole. outputs: Runs each block once with each LoRA, and "
            "weighs what they add to its output (MoLE by its equations). prompt: Reads the text once per prompt. rank: "
            "Weighs each rank of each LoRA at every layer by what it reads there. retrieval: Compares the LoRAs' "
            "outputs at every layer, and serves LoRAs that it never saw. static: Learns weights that are constant or "
            "change with time. Default: factors.",
        ),
    ] = None,
    start: Annotated[
        Literal["sum", "mean", "faithful"] | None,
        Option(
            show_default="sum",
            rich_help_panel="Which gates",
            help='flow: weights before training: the plain "sum", the "mean", or "faithful" to the paper (the last LoRA '
            "alone).",
        ),
    ] = None,
    granularity: Annotated[
        Literal["model", "block", "layer", "matrix"] | None,
        Option(
            show_default="block",
            rich_help_panel="Which gates",
            help='mole, static: one gate per "model", "block", "layer" (attention or feed-forward) or "matrix".',
        ),
    ] = None,
    total: Annotated[
        Literal["1", "N", "sigmoid", "linear", "none"] | None,
        Option(
            show_default="N",
            rich_help_panel="Which gates",
            help='mole: weights sum to "1" (the paper), or to their number "N"; or they do not, each a "sigmoid" or '
            '"linear". prompt: what the weights sum to: 1, N, or none: probabilities as top-k left them. retrieval: '
            'what the weights sum to: 1 as in the paper, or N. static: weights sum to "1", or to their number "N"; or '
            'they do not, each a "sigmoid" or "linear".',
        ),
    ] = None,
    inputs: Annotated[
        Literal["hidden", "experts"] | None,
        Option(
            show_default="hidden",
            rich_help_panel="Which gates",
            help='mole: read the "hidden" state (the authors\' code) or the outputs of the "experts" (the paper).',
        ),
    ] = None,
    features: Annotated[
        Literal["pooled", "flattened"] | None,
        Option(
            show_default="pooled",
            rich_help_panel="Which gates",
            help='mole, outputs: tokens are "pooled" (any resolution) or "flattened" (the paper; one resolution).',
        ),
    ] = None,
    bias: Annotated[
        bool | None,
        Option(
            show_default="False",
            rich_help_panel="Which gates",
            help="mole: add a learned number per LoRA, which the paper does not have. Needed to start at unequal weights.",
        ),
    ] = None,
    area: Annotated[
        float | None,
        Option(
            min=0.01,
            max=100,
            show_default="1.0",
            rich_help_panel="Which gates",
            help="outputs: for flattened features: the pictures' area, in areas of the model's own size.",
        ),
    ] = None,
    axis: Annotated[
        Literal["concept", "module", "both"] | None,
        Option(
            show_default="concept",
            rich_help_panel="Which gates",
            help='prompt: share weight among LoRAs ("concept"), the layers of a block ("module"), or "both".',
        ),
    ] = None,
    top: Annotated[
        int | None,
        Option(
            min=0,
            max=65536,
            show_default="0",
            rich_help_panel="Which gates",
            help="prompt: how many of these have weight. 0 is all. rank: how many ranks of a layer have weight. 0 is all.",
        ),
    ] = None,
    partition: Annotated[
        int | None,
        Option(
            min=0,
            max=65536,
            show_default="1",
            rich_help_panel="Which gates",
            help="rank: this many ranks of a LoRA share one output of the router; 0 is all ranks of the LoRA.",
        ),
    ] = None,
    refactor: Annotated[
        bool | None,
        Option(
            show_default="True",
            rich_help_panel="Which gates",
            help="rank: turn each LoRA's ranks to its singular directions first, which changes nothing else.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            show_default="1e-05",
            rich_help_panel="Which gates",
            help="rank: how far an update moves the bias that evens out the load, 0 to 1.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        Option(
            min=1,
            max=128,
            show_default="4",
            rich_help_panel="Which gates",
            help="retrieval: rank of the gate's router, 1 to 128.",
        ),
    ] = None,
    scores: Annotated[
        Literal["token", "image"] | None,
        Option(
            show_default="token",
            rich_help_panel="Which gates",
            help='retrieval: each "token" has its own weights, or the "image" has one set.',
        ),
    ] = None,
    bins: Annotated[
        int | None,
        Option(
            min=1,
            max=1000,
            show_default="1",
            rich_help_panel="Which gates",
            help="static: number of sets of weights over the noise levels, 1 to 1000.",
        ),
    ] = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Train gates for a set of LoRAs: how much each one acts, where and when.

    You only need prompts: the LoRAs themselves are the teachers. Without --expert, mole takes the LoRAs of the emoji
    world that the prompts name. `accelerate launch -m mole_cli train` divides the work over GPUs.
    """
    run = SimpleNamespace(**locals())
    learned = {
        "composed": prompt,
        "plain": plain,
        "styles": style,
        "singles": grouped_values(single, "--single"),
        "others": grouped_values(other, "--other"),
    }
    updates = {name: vars(run)[name] for name in GATE_UPDATES} | {"terms": once(map(_term, term), "--term")}
    experts = named_values(expert, "--expert")
    gates = {name: vars(run)[name] for name in GATES}
    sections = {"experts": experts, "gates": gates, "lesson": learned, "training": updates}
    asked = settings(run, sections, data, clip=clip)
    if experts:
        asked["experts"] = experts  # not beside those of the file
    check_kinds(asked["experts"], dict.fromkeys(asked["experts"], str), "the experts")
    if not run.write_config:
        lora_files(asked["experts"])
    if validate is not None:
        looks = asked["training"].get("validation", {})
        check_kinds({"validation": looks}, {"validation": Mapping[str, Any]}, "the training")
        asked["training"]["validation"] = {**looks, "every": validate}
    GateTraining.from_dict(stated(asked["training"]))  # without the terms that prompts decide, and the size
    from mole_diffusers.gates import RECOMMENDED, GateConfig
    from mole_diffusers.training import TrainingData

    if prompt or part:  # then parts in the file are of another prompt, or others
        asked["lesson"].pop("parts", None)
    if part:
        prompts = TrainingData.from_dict(asked["lesson"]).composed
        if len(prompts) != 1:
            raise ValueError(f"--part tells the subjects of one --prompt, got {len(prompts)} prompts")
        asked["lesson"]["parts"] = {prompts[0]: list(part)}
    asked["gates"] = {"gate_type": RECOMMENDED, **asked["gates"]}
    taught, config_of = TrainingData.from_dict(asked["lesson"]), GateConfig.from_dict(asked["gates"])
    carried_out(run, asked, partial(_train_gates, asked, taught, config_of, run, push_to_hub))


def _term(text: str) -> tuple[str, Any]:
    """NAME[=WEIGHT][,OPTION=VALUE] -> (name, its settings)."""
    first, *rest = re.split(r",(?![^\[]*\])", text)  # but not at commas inside a list, as in lengths=[20,50]
    name, _, weight = first.partition("=")
    named = {"weight": weight or "1", **named_values(rest, "--term")}
    return name, {key: json_or_text(value) for key, value in named.items()}


def _train_gates(
    asked: Mapping[str, Any], data: Any, gates: Any, run: SimpleNamespace, repo: str | None, out: Path
) -> tuple[Any, str]:
    from mole_app.studio.names import is_hub_id
    from mole_diffusers import attach, denoiser
    from mole_diffusers.gates import CARD, GATE_CONFIG, GATE_WEIGHTS, model_card, upload
    from mole_diffusers.training import mean_losses, read_clip, save_weight_memory, summary, train_gates
    from mole_diffusers.whole_files import write_text

    base = asked["base"]
    parts = asked["lesson"].get("parts", {})
    learned = {"single": data.singles, "composed": data.composed}
    own = ["collage"] if parts else [name for name, prompts in learned.items() if prompts]
    terms = asked["training"].get("terms") or dict.fromkeys(own, 1.0)
    config = GateTraining.from_dict({**_canvas(base, data), **asked["training"], "terms": terms})
    there = {"part": parts, "style": data.styles, "plain": data.plain, "other": data.others}
    there |= {"data": asked["data"], "clip": asked["clip"]}
    there |= {"single": data.singles} if config.initial == "uniform" else {}  # other first weights need them
    if not config.validation.every:  # which draws them
        there |= {"prompt": [prompt for prompt in data.composed if prompt not in parts]}
        there |= {name: asked["training"].get(name) for name in ("width", "height")}
    unread = [name for name, value in there.items() if value and not set(READ_BY[name]) & set(config.parsed)]
    if unread and is_main_process():
        needed = ", ".join(f"--{name} (--term {' or '.join(READ_BY[name])})" for name in unread)
        note(f"nothing is learned from {needed}; the terms are {', '.join(config.parsed)}")
    prompts = [*data.composed, *chain(*parts.values(), *data.singles.values())]
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
    return {"out": str(out), "updates": len(log), **last}, words


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


def train_lora(
    data: Annotated[list[str], Option(metavar="FOLDER", help="pictures, with or without captions. Repeatable.")] = [],
    prior_weight: Annotated[
        float | None, Option(metavar="WEIGHT", show_default=False, help="how much pictures of the class count. Default: 1.")
    ] = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    base: options.TrainedBase = None,
    out: options.RunFolder = None,
    config: options.Config = None,
    write_config: options.WriteConfig = None,
    resume: options.Resume = None,
    trigger: Annotated[
        str | None,
        Option(metavar="WORDS", rich_help_panel="What to learn from", help="the words that will call the concept."),
    ] = None,
    prompt: Annotated[
        str | None,
        Option(
            show_default=False,
            rich_help_panel="What to learn from",
            help="caption of pictures without one. Default: the trigger.",
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        Option(
            metavar="PIXELS",
            show_default=False,
            rich_help_panel="What to learn from",
            help="pictures are cut to squares of this side. Default: the base's own.",
        ),
    ] = None,
    format: Annotated[
        Literal["diffusers", "kohya"] | None,
        Option(
            show_default=False,
            rich_help_panel="What to learn from",
            help="kohya is for A1111 and ComfyUI. Default: diffusers.",
        ),
    ] = None,
    prior_prompt: Annotated[
        str | None, Option(rich_help_panel=PRESERVING, help="what the base draws: 'a photo of a dog'.")
    ] = None,
    prior_data: Annotated[
        list[str],
        Option(
            metavar="FOLDER",
            rich_help_panel=PRESERVING,
            help="your own pictures of the class, instead of drawn ones. Repeatable.",
        ),
    ] = [],
    prior_count: Annotated[
        int | None,
        Option(metavar="N", show_default=False, rich_help_panel=PRESERVING, help="pictures to draw. Default: 64."),
    ] = None,
    prior_steps: Annotated[
        int | None,
        Option(metavar="N", show_default=False, rich_help_panel=PRESERVING, help="steps of the sampler. Default: 25."),
    ] = None,
    prior_guidance: Annotated[
        float | None,
        Option(
            metavar="SCALE",
            show_default=False,
            rich_help_panel=PRESERVING,
            help="how strictly to follow the prompt. Default: 7.5.",
        ),
    ] = None,
    steps: Annotated[
        int | None, Option(show_default="300", rich_help_panel="How to train", help="number of updates.")
    ] = None,
    batch: Annotated[
        int | None,
        Option(
            show_default="16",
            rich_help_panel="How to train",
            help="pictures per update, over all processes and accumulated parts together; plus as many class pictures.",
        ),
    ] = None,
    accumulation: options.Accumulation = None,
    seed: options.TrainingSeed = None,
    precision: options.Precision = None,
    checkpointing: options.Checkpointing = None,
    every: Annotated[
        int | None, Option(show_default="100", rich_help_panel="How to train", help="updates between checkpoints.")
    ] = None,
    keep: options.Keep = None,
    rank: Annotated[
        int | None, Option(show_default="8", rich_help_panel="How to train", help="rank of every layer, 1 or more.")
    ] = None,
    alpha: Annotated[
        float | None,
        Option(
            show_default=False,
            rich_help_panel="How to train",
            help="the scale is alpha / rank. Default: the rank, in a file and on the command line.",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        Option(
            show_default="attention",
            rich_help_panel="How to train",
            help="which layers get a LoRA: attention, feed-forward, convolution. Repeatable.",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        Option(
            show_default="0.001",
            rich_help_panel="How to train",
            help="AdamW's peak learning rate, with a cosine down to a tenth.",
        ),
    ] = None,
    text_lr: Annotated[
        float | None,
        Option(
            show_default="0.0005", rich_help_panel="How to train", help="the same for the text encoder; 0 does not train it."
        ),
    ] = None,
    beam: Annotated[
        bool | None,
        Option(
            show_default="False",
            rich_help_panel="How to train",
            help="let ranks compete (BeamLoRA); needs a rank of 8 or more.",
        ),
    ] = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Teach a base one concept from pictures. The result is an ordinary LoRA file, named after the folder --out.

    `accelerate launch -m mole_cli train-lora` divides the work over GPUs.
    """
    run = SimpleNamespace(**locals())
    updates = {f.name: vars(run)[f.name] for f in fields(LoraTraining) if f.name != "prior"} | {"prior": prior_weight}
    concept = {name: vars(run)[name] for name in CONCEPT}
    prior = {name: vars(run)[f"prior_{name}"] for name in PRIOR}
    asked = settings(run, {"concept": concept, "prior": prior, "training": updates}, data)
    check_options(asked["concept"], CONCEPT, "the concept")
    check_options(asked["prior"], PRIOR, "the prior")
    drawn = [f"--prior-{name}" for name in ("count", "steps", "guidance") if name in asked["prior"]]
    if drawn and asked["prior"].get("data"):
        raise ValueError(f"--prior-data is pictures of the class, and none are drawn: leave out {', '.join(drawn)}")
    folders = [*asked["data"], *asked["prior"].get("data", [])]
    if not run.write_config and (gone := [folder for folder in folders if not Path(folder).is_dir()]):
        raise ValueError(f"there is no folder {gone[0]} with pictures")
    how = LoraTraining.from_dict(asked["training"])
    carried_out(run, asked, partial(_train_lora, asked, how, run))


def _train_lora(asked: Mapping[str, Any], config: LoraTraining, run: SimpleNamespace, out: Path) -> tuple[Any, str]:
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
    return facts, f"{path}: trigger {trigger!r}"
