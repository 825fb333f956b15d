"""Options that several commands have: one by one as types, and in groups that `takes` gives to a command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Context, Option

from mole_diffusers.cli.console import quiet

WORLD = "emoji"  # as a base: the embedded world
THRESHOLD = 0.7  # as in retrieval.library, which needs torch
NONE: list[str] = []  # default of an option that may be repeated
Given = Mapping[str, Any]  # what was given of a group: option -> value


def takes(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command groups of options: classes whose fields are options, with their defaults.

    The options of a group reach the command as one mapping, the argument of the group's name.
    """
    fields = {name: get_type_hints(group, include_extras=True) for name, group in groups.items()}

    def added(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            mappings = {name: {option: given.pop(option) for option in found} for name, found in fields.items()}
            command(**given, **mappings)

        own = inspect.signature(command, eval_str=True)
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=kind) for p in own.parameters.values() if p.name not in groups]
        for name, group in groups.items():
            parameters += [
                inspect.Parameter(option, kind, default=getattr(group, option), annotation=annotation)
                for option, annotation in fields[name].items()
            ]
        vars(run)["__signature__"] = own.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return added


def _be_quiet_unless(ctx: Context, verbose: bool) -> None:
    if not verbose:
        ctx.with_resource(quiet())


# ---- the base

BASE: dict[str, Any] = {  # of the option --base
    "metavar": "MODEL",
    "help": "A .safetensors checkpoint, a folder that diffusers saved, a models folder of A1111 or ComfyUI followed by the "
    "name of a model in it (models/dreamshaper), or a hub id; emoji is the world in this package.",
}
BASE_CONFIG: dict[str, Any] = {  # of the option --base-config
    "metavar": "FOLDER",
    "help": "For a checkpoint: a diffusers folder of the same kind of model, whose weights are not needed, or a hub id. "
    "Default: that of the Forge folder around it, else the official one.",
}
Base = Annotated[str, Option(**BASE)]
BaseConfig = Annotated[str | None, Option("--base-config", **BASE_CONFIG)]
DEVICE: dict[str, Any] = {"help": "cpu, cuda, cuda:1, mps, ... Default: a GPU where there is one."}
Device = Annotated[str | None, Option(**DEVICE)]

memory = functools.partial(Option, rich_help_panel="The base model on this machine")


class Opening:
    """How the base is put on the machine; what `common.opened` takes."""

    device: Annotated[str | None, memory(**DEVICE)] = None
    config: Annotated[str | None, memory("--base-config", **BASE_CONFIG)] = None
    dtype: Annotated[
        str | None, memory(help="float32, float16 or bfloat16. Default: float32 on a CPU, half precision on a GPU.")
    ] = None
    offload: Annotated[
        str | None,
        memory(help="none, model or sequential: what leaves the GPU while it is not used. Default: what fits."),
    ] = None
    slicing: Annotated[bool, memory("--slicing", help="Attention head by head: less memory, more time.")] = False
    tiling: Annotated[
        bool | None, memory("--tiling/--no-tiling", help="Large pictures by tiles. Default: where memory is short.")
    ] = None
    compiled: Annotated[bool, memory("--compile", help="Minutes at the first picture, faster from then on.")] = False


# ---- LoRAs and gates

Experts = Annotated[
    list[str], Option("--expert", metavar="NAME=FILE[:STRENGTH]", help="A LoRA file and the name you give it. Repeatable.")
]
Loras = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        help="LoRA files that tags may name, in subfolders too; two of one name are people/fox and animals/fox. The emoji "
        "world has its own.",
    ),
]
NamedGates = Annotated[
    str,
    Option("--gates", help="Trained gates by name or folder, sum or mean; auto takes your own for these LoRAs, else sum."),
]
Trained = Annotated[Path | None, Option(metavar="FOLDER", help="Trained gates that may be named: a folder each.")]


class Studio:
    """A base with the LoRAs and gates that prompts and recipes may name; what `common.open_studio` takes."""

    base: Base = WORLD
    loras: Loras = None
    expert: Annotated[list[str], Option(metavar="NAME=FILE", help="One more LoRA file that tags may name. Repeatable.")] = (
        NONE
    )
    trained: Trained = None


Library = Annotated[Path, Option(metavar="FOLDER", help="A folder that `mole index` has indexed.")]
Encoder = Annotated[
    str | None,
    Option(metavar="MODEL", help="A sentence-transformers model that reads texts. Default: the text encoder of --base."),
]
Count = Annotated[int, Option("--k", help="At most so many LoRAs; those whose trigger words are said all count.")]
Threshold = Annotated[float, Option(help="Similarity that a LoRA needs whose trigger words are not said.")]

# ---- pictures

Steps = Annotated[int, Option(help="Steps of the sampler: more take longer.")]
Seed = Annotated[int, Option(min=-1, help="The same seed gives the same picture; -1 is a random one.")]


class Drawing:
    """How pictures are drawn."""

    negative: Annotated[str, Option(metavar="PROMPT", help="What shall not be in the picture.")] = ""
    prompt_2: Annotated[
        str,
        Option(metavar="PROMPT", help="For the second text encoder of SDXL, SD 3 or Flux. Default: the same as the first."),
    ] = ""
    negative_2: Annotated[str, Option(metavar="PROMPT", help="As --prompt-2.")] = ""
    steps: Steps = 20
    guidance: Annotated[
        float | None,
        Option(help="How strictly the prompt is followed. Default: 7; Flux 3.5, Stable Diffusion 3 5, the emoji world 3."),
    ] = None
    sampler: Annotated[
        str,
        Option(
            metavar="NAME",
            help="Euler a, DPM++ 2M Karras, UniPC, LCM, ...; a wrong name lists all. Default: the base's own.",
        ),
    ] = ""
    width: Annotated[
        int | None,
        Option(help="Pixels, rounded to what the base can draw. Default: as it draws such a prompt, or as --image."),
    ] = None
    height: Annotated[int | None, Option(help="As --width.")] = None


over = functools.partial(Option, rich_help_panel="Drawing over a picture")


class Pictures:
    """What is drawn over; what `common.open_pictures` takes."""

    image: Annotated[Path | None, over(metavar="PICTURE", help="A picture to draw over (img2img).")] = None
    mask: Annotated[Path | None, over(metavar="PICTURE", help="White where --image is drawn over (inpainting).")] = None


class Over:
    """How much is drawn over."""

    strength: Annotated[float, over(min=0, max=1, help="How much of --image is drawn anew.")] = 0.6
    hires: Annotated[float, over(min=1, max=4, help="Make the picture so much larger and draw over it once more.")] = 1.0
    hires_strength: Annotated[float, over(min=0, max=1, help="How much of it is drawn anew then.")] = 0.5


# ---- what is written and said

Overwrite = Annotated[bool, Option("--overwrite", help="Write over a file that is there.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[
    bool,
    Option(
        "--verbose",
        "-v",
        help="Show warnings, notices and loading bars of other libraries.",
        callback=_be_quiet_unless,
    ),
]
