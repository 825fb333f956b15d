"""`mole compose`: a prompt with several LoRAs, beside what each of them does alone."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import experts_for, named_values, opened, target
from mole_diffusers.cli.console import note
from mole_diffusers.cli.options import NONE, WORLD


class Sheet:
    """The rows of a sheet, and its file."""

    seed: Annotated[int, Option(min=-1, help="Seed of the first row, -1 for a random one; each further row adds 1.")] = 0
    rows: Annotated[int, Option(min=1, help="Pictures per column, each with its own seed.")] = 4
    out: Annotated[
        Path | None,
        Option(metavar="PNG", help="Where the pictures go, side by side. Default: a new grid.png, grid-2.png, ..."),
    ] = None
    overwrite: options.Overwrite = False


@options.takes(sheet=Sheet, how=options.Drawing, opening=options.Opening)
def compose(
    prompt: Annotated[str, Argument(help="What to draw.")] = "noto drawing of a sunflower and a doughnut",
    expert: options.Experts = NONE,
    gates: Annotated[
        str,
        Option(help="Trained gates, a folder or a hub id, or a family such as mean: a column more."),
    ] = "sum",
    bind: Annotated[
        list[str],
        Option(
            metavar="NAME=WORDS[@REGION]",
            help="Words of the prompt that are a LoRA's, and where it acts: fox=a fox@left, fox=@0,0,0.5,1, fox=everywhere, "
            "fox=fox@mask.png. Default: the file's trigger words, and places found from attention. Repeatable.",
        ),
    ] = NONE,
    unbound: Annotated[bool, Option("--unbound", help="Let every LoRA act on every word and in the whole picture.")] = False,
    base: options.Base = WORLD,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    sheet: options.Given,
    how: options.Given,
    opening: options.Given,
) -> None:
    """Draw a prompt with several LoRAs, beside the base, each LoRA alone and the plain sum.

    Each LoRA is bound to its own words of the prompt and to a place of its own; where each place has room for a picture of
    the size that the model was trained at, it is also drawn by itself at first, in tiles.

    Without --expert, the LoRAs of the emoji world that the prompt names are taken.
    """
    from tqdm import tqdm

    if "<lora:" in prompt:
        raise ValueError("a prompt with <lora:...> tags is for mole draw; name the files with --expert here")
    seeds, path = started(sheet)
    experts = experts_for(base, named_values(expert, "--expert"), prompt)
    from mole_diffusers.binding.config import parse_binding
    from mole_diffusers.inspection.compare import columns
    from mole_diffusers.mixture import attach
    from mole_diffusers.patching.tiles import draws_in_tiles
    from mole_diffusers.studio.prompt_weights import plain_texts, tiled_prompt
    from mole_diffusers.studio.weight_syntax import plain_text

    pipe = opened(base, opening).pipe
    call = call_options(pipe, base, prompt, how, seeds)
    if unbound and bind:
        raise ValueError("--bind and --unbound exclude each other")
    binding = None if unbound else dict(parse_binding(text, "--bind") for text in bind)
    mixture = attach(pipe, experts, gates, binding=binding)
    pictures = {}
    texts = plain_texts(pipe, prompt, **other_prompts(how), guided=call["guidance_scale"] > 1)
    has_tiles = mixture.binding and texts and draws_in_tiles(pipe, texts | call, mixture.binding, experts)
    tiles = tiled_prompt(pipe, prompt) if has_tiles else None
    for label, context in tqdm(columns(mixture, tiles).items(), desc="columns", delay=2, leave=False):
        with context():
            pictures[label] = drawn(pipe, prompt, how, seeds, call)
    if base == WORLD and (drawing := _true_drawing(plain_text(prompt))):
        pictures["true drawing"] = [drawing] * len(seeds)
    about = {"prompt": prompt, **other_prompts(how), "experts": list(mixture.experts), "gates": mixture.config.to_dict()}
    about |= {"sha256": {name: expert.sha256 for name, expert in mixture.experts.items()}, "bind": bind, "base": base}
    about |= {"seeds": seeds, "sampler": how["sampler"], **call}
    write_sheet(pictures, seeds, path, about)
    print(json.dumps({"out": str(path), **about}) if as_json else f"{prompt}: {path}")


def call_options(pipe: Any, base: str, prompt: str, how: options.Given, seeds: Sequence[int]) -> dict[str, Any]:
    """The options of a pipeline call that draws pictures of `seeds`, with the size rounded; the sampler is put on the
    pipeline, and prompts that it does not read are said on stderr."""
    from mole_diffusers.studio.base_models import usual_guidance, usual_size
    from mole_diffusers.studio.picture_passes import drawable
    from mole_diffusers.studio.prompt_weights import unread
    from mole_diffusers.studio.samplers import sampler

    for each in unread(pipe, **other_prompts(how)):
        note(each)
    pipe.scheduler = sampler(how["sampler"], pipe.scheduler, seeds)
    guidance = usual_guidance(pipe, base) if how["guidance"] is None else how["guidance"]
    call: dict[str, Any] = {"num_inference_steps": how["steps"], "guidance_scale": guidance}
    own = usual_size(pipe, base, prompt)
    size = drawable(pipe, how["width"] or own[0], how["height"] or own[1])
    return call | dict(zip(("width", "height"), size, strict=True))


def other_prompts(how: options.Given) -> dict[str, Any]:
    """The prompts beside the first, by their options."""
    return {name: how[name] for name in ("negative", "prompt_2", "negative_2")}


def drawn(pipe: Any, prompt: str, how: options.Given, seeds: Sequence[int], call: Mapping[str, Any]) -> list[Any]:
    """One picture per seed, each from a generator of its own."""
    import torch

    from mole_diffusers.studio.prompt_weights import call_arguments

    texts = call_arguments(pipe, prompt, **other_prompts(how), guided=call["guidance_scale"] > 1)
    rows = {
        name: [value] * len(seeds) if isinstance(value, str) else value.repeat_interleave(len(seeds), 0)
        for name, value in texts.items()
    }
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return pipe(**rows, generator=generators, **call).images


def _true_drawing(prompt: str) -> Any:
    """What the artists of the emoji world drew of it; None where the prompt names nothing of it."""
    from mole_diffusers import emoji

    scene = emoji.scene_in(prompt)
    return emoji.Drawings(emoji.default_folder()).picture(scene) if scene else None


def started(sheet: options.Given) -> tuple[list[int], Path]:
    """The seed of each row of a sheet, and where it is written."""
    first = secrets.randbelow(1 << 32) if sheet["seed"] == -1 else sheet["seed"]
    return list(range(first, first + sheet["rows"])), target(sheet["out"], "grid.png", overwrite=sheet["overwrite"])


def write_sheet(columns: Mapping[str, Sequence[Any]], seeds: Sequence[int], path: Path, about: dict[str, Any]) -> None:
    """Write pictures by column label, one per seed, as one sheet; `about` is kept in the file."""
    from mole_diffusers.inspection.compare import image_grid
    from mole_diffusers.studio import infotext

    rows = [[images[i] for images in columns.values()] for i in range(len(seeds))]
    sheet = image_grid(rows, list(columns), [f"seed {s}" for s in seeds])
    infotext.save(sheet, path, None, {"columns": list(columns), **about})
