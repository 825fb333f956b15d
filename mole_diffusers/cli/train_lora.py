"""`mole train-lora`: teach a base one concept from a folder of pictures; the result is an ordinary LoRA file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from typer import Option

from mole_diffusers.cli import options
from mole_diffusers.cli.options import NONE
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
from mole_diffusers.training.config import LoraTraining

CLASS = "Prior preservation: pictures of the class, which the base shall go on drawing as it does"
learn = partial(Option, rich_help_panel=PICTURES)
class_picture = partial(Option, rich_help_panel=CLASS)


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


Learning = updates(
    LoraTraining,
    rank="Size of the LoRA.",
    alpha="Scale times rank. Default: the rank.",
    batch="Pictures per update, over all processes.",
    lr="Learning rate.",
    text_lr="Learning rate of the text encoder; 0 leaves it alone.",
    beam="Let ranks compete (BeamLoRA); from rank 8 on.",
    seed="The same seed gives the same LoRA.",
)


@options.takes(run=Run, concept=Concept, prior=Prior, training=Learning)
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
    out = run["out"]
    if out is None or not asked["data"] or not asked["concept"].get("trigger"):
        raise ValueError("--out (a folder), --data (a folder of pictures) and --trigger (the concept's words) are needed")
    if asked["prior"] and not asked["prior"].get("data") and not asked["prior"].get("prompt"):
        raise ValueError("--prior-prompt is needed: what the base is to draw for prior preservation")
    facts = _train(asked, config, run["device"], out, resume=run["resume"])
    if is_main_process():
        print(json.dumps(facts) if as_json else f"{facts['file']}: trigger {asked['concept']['trigger']!r}")


def _train(
    asked: Mapping[str, Any], config: LoraTraining, device: str | None, out: Path, *, resume: str | None
) -> dict[str, Any]:
    from mole_diffusers.training import train_lora as fit

    concept = asked["concept"]
    pipe, trigger, side = trained_pipeline(asked, device), concept["trigger"], concept.get("resolution")
    pictures: Any = samples(pipe, asked["data"], prompt=concept.get("prompt") or trigger, side=side)
    if mute := [caption for caption in pictures.captions if trigger not in caption]:
        warnings.warn(f"the caption {mute[0]!r} lacks the trigger {trigger!r}, {len(mute)} do", stacklevel=2)
    prior = _prior(pipe, asked["prior"], out if is_main_process() else None, side=side, seed=config.seed)
    tensors = fit(pipe, pictures, config, prior=prior, name=out.name, folder=out, resume_from=resume)
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
