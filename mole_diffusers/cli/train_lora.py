"""`mole train-lora`: teach a base one concept from a folder of pictures; the result is an ordinary LoRA file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Context, Option

from mole_diffusers.cli.common import (
    BASE,
    NONE,
    WORLD,
    BaseConfigOption,
    DeviceOption,
    JsonOption,
    VerboseOption,
    pipeline,
)
from mole_diffusers.cli.training_runs import (
    PICTURES,
    UPDATES,
    ConfigOption,
    OutOption,
    ResumeOption,
    WriteConfigOption,
    fields_of,
    given,
    is_main_process,
    own_device,
    read_settings,
    samples,
    setting,
    write_settings,
)
from mole_diffusers.training.config import LoraTraining

SECTIONS = ("base", "base_config", "data", "concept", "prior", "training")
CONCEPT = ("trigger", "prompt", "resolution", "format")
PRIOR = ("prompt", "data", "count", "steps", "guidance")
CLASS = "Prior preservation: pictures of the class, which the base shall go on drawing as it does"
update = partial(setting, LoraTraining)
learn = partial(Option, rich_help_panel=PICTURES)
class_picture = partial(Option, rich_help_panel=CLASS)


def train_lora(
    ctx: Context,
    base: Annotated[str | None, Option(**BASE, show_default=WORLD)] = None,
    base_config: BaseConfigOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    config: ConfigOption = None,
    write_config: WriteConfigOption = None,
    resume: ResumeOption = None,
    as_json: JsonOption = False,
    # What to learn from
    data: Annotated[list[str], learn(metavar="FOLDER", help="Pictures, with captions or without. Repeatable.")] = NONE,
    trigger: Annotated[str | None, learn(metavar="WORDS", help="What will call the concept.")] = None,
    prompt: Annotated[str | None, learn(help="Caption of pictures without one. Default: the trigger.")] = None,
    resolution: Annotated[
        int | None, learn(metavar="PIXELS", help="Pictures are cut to squares of this side. Default: the base's own.")
    ] = None,
    format: Annotated[
        Literal["diffusers", "kohya"] | None,
        learn(help="kohya is for A1111 and ComfyUI.", show_default="diffusers"),
    ] = None,
    # Prior preservation
    prior_prompt: Annotated[str | None, class_picture(help="What the base draws: 'a photo of a dog'.")] = None,
    prior_data: Annotated[list[str], class_picture(metavar="FOLDER", help="Or pictures of your own. Repeatable.")] = NONE,
    prior_count: Annotated[int | None, class_picture(metavar="N", help="Pictures to draw.", show_default="64")] = None,
    prior_steps: Annotated[int | None, class_picture(metavar="N", help="Steps of the sampler.", show_default="25")] = None,
    prior_guidance: Annotated[
        float | None, class_picture(metavar="SCALE", help="How strictly the prompt is followed.", show_default="7.5")
    ] = None,
    prior_weight: Annotated[
        float | None,
        class_picture(metavar="WEIGHT", help="How much they count.", show_default=str(LoraTraining.prior)),
    ] = None,
    # How to train
    rank: Annotated[int | None, update("rank", "Size of the LoRA.")] = None,
    alpha: Annotated[float | None, Option(help="Scale times rank. Default: the rank.", rich_help_panel=UPDATES)] = None,
    layers: Annotated[
        list[str],
        Option(
            metavar="KIND",
            help="Which layers: attention, feed-forward, convolution. Repeatable. Default: attention.",
            rich_help_panel=UPDATES,
        ),
    ] = NONE,
    steps: Annotated[int | None, update("steps", "Updates.")] = None,
    batch: Annotated[int | None, update("batch", "Pictures per update, over all processes.")] = None,
    lr: Annotated[float | None, update("lr", "Learning rate.")] = None,
    text_lr: Annotated[float | None, update("text_lr", "Learning rate of the text encoder; 0 leaves it alone.")] = None,
    beam: Annotated[
        bool | None, Option("--beam", help="Let ranks compete (BeamLoRA); from rank 8 on.", rich_help_panel=UPDATES)
    ] = None,
    seed: Annotated[int | None, update("seed", "The same seed gives the same LoRA.")] = None,
    precision: Annotated[str | None, update("precision", "no (full), bf16 or fp16.")] = None,
    accumulation: Annotated[int | None, update("accumulation", "Compute a batch in so many parts, for less memory.")] = None,
    checkpointing: Annotated[
        bool | None, Option("--checkpointing", help="Less memory, more time.", rich_help_panel=UPDATES)
    ] = None,
    every: Annotated[int | None, update("every", "Updates between checkpoints.")] = None,
    keep: Annotated[int | None, update("keep", "How many checkpoints are kept.")] = None,
    verbose: VerboseOption = False,
) -> None:
    """Teach a base one concept from pictures. The result is an ordinary LoRA file, named as the folder --out.

    `accelerate launch -m mole_diffusers train-lora` divides the work over GPUs.
    """
    asked = settings(ctx.params)
    if write_config:
        write_settings(write_config, asked)
        return
    if out is None or not asked["data"] or not asked["concept"].get("trigger"):
        raise ValueError("--out (a folder), --data (a folder of pictures) and --trigger (the concept's words) are needed")
    prior = asked["prior"]
    if prior and not prior.get("data") and not prior.get("prompt"):
        raise ValueError("--prior-prompt is needed: what the base is to draw for prior preservation")
    facts = _train(asked, device, out, resume=resume)
    if is_main_process():
        print(json.dumps(facts) if as_json else f"{facts['file']}: trigger {asked['concept']['trigger']!r}")


def settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was asked, as plain data: what the file says, overridden by the flags."""
    file = read_settings(flags["config"], SECTIONS) if flags["config"] else {}
    sections = {
        "concept": {name: flags[name] for name in CONCEPT},
        "prior": {name: flags[f"prior_{name}"] for name in PRIOR},
        "training": fields_of(LoraTraining, flags) | {"prior": flags["prior_weight"]},
    }
    merged = {name: file.get(name, {}) | given(section) for name, section in sections.items()}
    for name, known in (("concept", CONCEPT), ("prior", PRIOR), ("training", [f.name for f in fields(LoraTraining)])):
        if unknown := set(merged[name]) - set(known):
            raise ValueError(f"unknown {name} options {sorted(unknown)}; known: {list(known)}")
    alone = given({name: flags[name] for name in ("base", "base_config", "data")})
    return {"base": WORLD, "data": []} | file | merged | alone


def _train(asked: Mapping[str, Any], device: str | None, out: Path, *, resume: str | None) -> dict[str, Any]:
    from mole_diffusers.training import train_lora as fit

    concept, config = asked["concept"], _config(asked["training"])
    pipe, trigger, side = (
        pipeline(asked["base"], device or own_device(), config=asked.get("base_config"), half=False),
        concept["trigger"],
        concept.get("resolution"),
    )
    pictures: Any = samples(pipe, asked["data"], prompt=concept.get("prompt") or trigger, side=side)
    if mute := [caption for caption in pictures.captions if trigger not in caption]:
        warnings.warn(f"the caption {mute[0]!r} lacks the trigger {trigger!r}, {len(mute)} do", stacklevel=2)
    prior = _prior(pipe, asked["prior"], out if is_main_process() else None, side=side, seed=config.seed)
    tensors = fit(pipe, pictures, config, prior=prior, name=out.name, folder=out, resume_from=resume)
    path = out / f"{out.name}.safetensors"
    if is_main_process():
        _save(pipe, tensors, path, config, concept=concept, pictures=len(pictures.captions))
    return {"file": str(path), "trigger": trigger, "pictures": len(pictures.captions), "rank": config.rank}


def _config(training: Mapping[str, Any]) -> LoraTraining:
    """The training section, checked; alpha is the rank unless it is given."""
    options: dict[str, Any] = {"alpha": training.get("rank", LoraTraining.alpha), **training}
    if "layers" in options:
        options["layers"] = tuple(options["layers"])
    options["precision"] = options.get("precision") or "no"  # a bare no is False in YAML
    for field in fields(LoraTraining):
        if field.type in ("int", "float") and isinstance(value := options.get(field.name), str):
            raise ValueError(f"{field.name} must be a number, got {value!r}")
    return LoraTraining(**options)


def _prior(pipe: Any, asked: Mapping[str, Any], folder: Path | None, *, side: int | None, seed: int) -> Any:
    """Pictures of the class: the user's, else those that the base draws, else none."""
    from mole_diffusers.training import class_samples

    options = dict(asked)
    prompt, folders = options.pop("prompt", None), options.pop("data", [])
    if folders:
        return samples(pipe, folders, prompt=prompt, side=side)
    return class_samples(pipe, prompt, seed=seed, folder=folder, **options) if prompt else None


def _save(pipe: Any, tensors: Any, path: Path, config: LoraTraining, *, concept: Mapping[str, Any], pictures: int) -> None:
    from mole_diffusers.training.lora_adapter import header, save_kohya, save_lora

    about = header(pipe, title=path.stem, rank=config.rank, alpha=config.alpha, pictures=pictures)
    about["mole.training"] = json.dumps({name: str(value) for name, value in asdict(config).items()})
    if concept.get("format") == "kohya":
        two = getattr(pipe, "text_encoder_2", None) is not None
        save_kohya(tensors, path, alpha=config.alpha, triggers=concept["trigger"], about=about, two_encoders=two)
    else:
        save_lora(tensors, path, alpha=config.alpha, rank=config.rank, triggers=concept["trigger"], about=about)
