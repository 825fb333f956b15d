"""What the commands share: options, and how pipelines, LoRAs, libraries and pictures are opened and written.

Nothing here or in a command imports torch before the command runs, so that `mole --help` answers at once.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Context, Option

if TYPE_CHECKING:
    from mole_diffusers.lora import Expert
    from mole_diffusers.studio.base_models import Base
    from mole_diffusers.studio.catalog import Catalog
    from mole_diffusers.studio.recipe import Recipe
    from mole_diffusers.studio.render import Studio

WORLD = "emoji"  # as a base: the embedded world
THRESHOLD = 0.7  # as in retrieval.library, which needs torch
NONE: list[str] = []  # default of an option that may be repeated


def busy(what: str) -> AbstractContextManager[Any]:
    """A sign on the terminal that something is going on whose length is not known."""
    return Console(stderr=True).status(what)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, notices and loading bars of other libraries off the console; warnings of our own are one line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(?!mole_diffusers)")
        as_before, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
        logging.disable(logging.WARNING)
        try:
            with busy("starting"):
                from diffusers.utils.logging import disable_progress_bar as hide_pipeline_bars
                from huggingface_hub.utils import enable_progress_bars as show_downloads
                from transformers.utils.logging import disable_progress_bar as hide_weight_bars
            hide_pipeline_bars()
            hide_weight_bars()
            show_downloads()  # which transformers hides with its own
            yield
        finally:
            warnings.formatwarning = as_before
            logging.disable(logging.NOTSET)


def _be_quiet_unless(ctx: Context, verbose: bool) -> None:
    if not verbose:
        ctx.with_resource(quiet())


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
BaseOption = Annotated[str, Option(**BASE)]
BaseConfigOption = Annotated[str | None, Option("--base-config", **BASE_CONFIG)]
DeviceOption = Annotated[str | None, Option(help="cpu, cuda, cuda:1, mps, ... Default: a GPU where there is one.")]
ExpertOption = Annotated[
    list[str], Option("--expert", metavar="NAME=FILE[:STRENGTH]", help="A LoRA file and the name you give it. Repeatable.")
]
TagExpertOption = Annotated[
    list[str], Option("--expert", metavar="NAME=FILE", help="One more LoRA file that tags may name. Repeatable.")
]
LorasOption = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        help="LoRA files that tags may name, in subfolders too; two of one name are people/fox and animals/fox. The emoji "
        "world has its own.",
    ),
]
NamedGatesOption = Annotated[
    str,
    Option("--gates", help="Trained gates by name, sum or mean; auto takes those trained for these LoRAs, else sum."),
]
TrainedOption = Annotated[Path | None, Option(metavar="FOLDER", help="Trained gates that may be named: a folder each.")]
LibraryOption = Annotated[Path, Option(metavar="FOLDER", help="A folder that `mole index` has indexed.")]
EncoderOption = Annotated[
    str | None,
    Option(metavar="MODEL", help="A sentence-transformers model that reads texts. Default: the text encoder of --base."),
]
CountOption = Annotated[int, Option("--k", help="At most so many LoRAs; those whose trigger words are said all count.")]
ThresholdOption = Annotated[float, Option(help="Similarity that a LoRA needs whose trigger words are not said.")]
SeedOption = Annotated[int, Option(min=-1, help="The same seed gives the same picture; -1 is a random one.")]
StepsOption = Annotated[int, Option(help="Steps of the sampler: more take longer.")]
GuidanceOption = Annotated[
    float | None,
    Option(help="How strictly the prompt is followed. Default: 7; Flux 3.5, Stable Diffusion 3 5, the emoji world 3."),
]
NegativeOption = Annotated[str, Option(metavar="PROMPT", help="What shall not be in the picture.")]
SamplerOption = Annotated[
    str,
    Option(
        metavar="NAME", help="Euler a, DPM++ 2M Karras, UniPC, LCM, ...; a wrong name lists all. Default: the base's own."
    ),
]
WidthOption = Annotated[int | None, Option(help="In pixels, rounded to what the base can draw. Default: the base's own.")]
HeightOption = Annotated[int | None, Option(help="As --width.")]
OverwriteOption = Annotated[bool, Option("--overwrite", help="Write over a file that is there.")]
JsonOption = Annotated[bool, Option("--json", help="Print the result as JSON.")]

VerboseOption = Annotated[
    bool,
    Option(
        "--verbose",
        "-v",
        help="Show warnings, notices and loading bars of other libraries.",
        callback=_be_quiet_unless,
    ),
]


memory = functools.partial(Option, rich_help_panel="The base model on this machine")
OPENING: dict[str, Any] = {  # options of commands that draw -> their types and defaults
    "config": (
        Annotated[str | None, memory("--base-config", **BASE_CONFIG)],
        None,
    ),
    "dtype": (
        Annotated[
            str | None,
            memory(help="float32, float16 or bfloat16. Default: float32 on a CPU, half precision on a GPU."),
        ],
        None,
    ),
    "offload": (
        Annotated[
            str | None,
            memory(help="none, model or sequential: what leaves the GPU while it is not used. Default: what fits."),
        ],
        None,
    ),
    "slicing": (Annotated[bool, memory("--slicing", help="Attention head by head: less memory, more time.")], False),
    "tiling": (
        Annotated[
            bool | None, memory("--tiling/--no-tiling", help="Large pictures by tiles. Default: where memory is short.")
        ],
        None,
    ),
    "compiled": (Annotated[bool, memory("--compile", help="Minutes at the first picture, faster from then on.")], False),
}


def opens_base(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of OPENING, which reach it as one mapping, `opening`."""
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        opening = {name: given.pop(name) for name in OPENING}
        command(**given, opening=opening)

    parameters = [p for p in own.parameters.values() if p.name != "opening"]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=kind) for p in parameters]
    parameters += [inspect.Parameter(n, kind, default=default, annotation=a) for n, (a, default) in OPENING.items()]
    vars(run)["__signature__"] = own.replace(parameters=parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def chosen_device(device: str | None) -> str:
    """The device of --device: by default the GPU, where there is one."""
    from mole_diffusers.studio.memory import Memory

    return Memory(device).completed("").device or "cpu"


def pipeline(
    base: str,
    device: str | None = None,
    *,
    config: str | None = None,
    half: bool = True,
    opening: Mapping[str, Any] | None = None,
) -> Any:
    """The pipeline of --base. Calls that take two seconds or more show a bar.

    Args:
        config: the value of --base-config, where `opening` is not given.
        half: whether the precision may be less than float32.
        opening: values of OPENING; where given, how the base was opened is said on stderr.
    """
    return opened(base, device, config=config, half=half, opening=opening).pipe


def opened(
    base: str,
    device: str | None = None,
    *,
    config: str | None = None,
    half: bool = True,
    opening: Mapping[str, Any] | None = None,
) -> Base:
    """As `pipeline`, with what is known of it."""
    from mole_diffusers.studio.base_models import open_base
    from mole_diffusers.studio.memory import Memory

    options = dict(opening or ({} if half else {"dtype": "float32", "offload": "none"}))
    config = options.pop("config", config)
    with busy(f"loading {base}"):
        found = open_base(base, config=config, memory=Memory(device, **options))
    found.pipe.set_progress_bar_config(delay=2, leave=False)
    if opening is not None:
        print(found, file=sys.stderr)
    return found


def named_values(texts: Sequence[str], option: str) -> list[tuple[str, str]]:
    """NAME=VALUE texts as pairs. Raises ValueError with the option and the text that is not one."""
    pairs = []
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ValueError(f"{option} {text!r} is not NAME=VALUE")
        pairs.append((name, value))
    return pairs


def grouped_values(texts: Sequence[str], option: str) -> dict[str, list[str]]:
    """NAME=VALUE texts as name -> values. Raises ValueError as `named_values` does."""
    groups: dict[str, list[str]] = {}
    for name, value in named_values(texts, option):
        groups.setdefault(name, []).append(value)
    return groups


def json_or_text(text: str) -> Any:
    """A number, a list and so on as in JSON; anything else is the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_file(text: str) -> tuple[Path, float]:
    """FILE[:STRENGTH] as file and strength, 1 by default. Raises ValueError for a strength that is no number."""
    file, colon, strength = text.rpartition(":")
    if not colon or "/" in strength or "\\" in strength or strength.endswith(".safetensors"):  # a drive's colon, say
        return Path(text), 1.0
    try:
        return Path(file), float(strength)
    except ValueError:
        raise ValueError(f"{text!r}: the strength {strength!r} is not a number") from None


def read_experts(files: Mapping[str, str]) -> dict[str, tuple[Expert, float]]:
    """Name -> FILE[:STRENGTH], as name -> (LoRA, strength)."""
    from mole_diffusers.lora import read_expert

    parsed = {name: parse_file(text) for name, text in files.items()}
    return {name: (read_expert(path, name), strength) for name, (path, strength) in parsed.items()}


def experts_for(base: str, files: Mapping[str, str], prompt: str) -> dict[str, tuple[Expert, float]]:
    """The LoRAs that were asked for; in the embedded world, where none were, those that the prompt names."""
    if files:
        return read_experts(files)
    if base != WORLD:
        raise ValueError("give at least one --expert NAME=FILE[:STRENGTH]")
    from mole_diffusers.emoji.world import concept_files
    from mole_diffusers.lora import read_expert

    known = concept_files()
    found = {name: (read_expert(path, name), 1.0) for name, path in known.items() if f" {name} " in f" {prompt} "}
    if not found:
        raise ValueError(f"the prompt names none of the world's concepts: {', '.join(known)}")
    return found


def open_studio(
    base: str,
    device: str | None,
    *,
    loras: Path | None,
    trained: Path | None,
    experts: Sequence[str] = (),
    opening: Mapping[str, Any] | None = None,
) -> Studio:
    """The pipeline of --base, with the LoRAs of --loras and --expert and the gates of --trained in its catalog."""
    from mole_diffusers.studio.render import Studio

    catalog = open_catalog([base], loras=loras, trained=trained, experts=experts)
    found = opened(base, device, opening=opening)
    return Studio(found.pipe, catalog, found.name)


def open_catalog(
    bases: Collection[str], *, loras: Path | None, trained: Path | None, experts: Sequence[str] = ()
) -> Catalog:
    """The LoRAs of --loras and --expert and the gates of --trained, with those of the embedded world where it is a base."""
    from mole_diffusers.studio.catalog import Catalog, folder_gates, folder_loras

    if WORLD in bases:
        from mole_diffusers.emoji.world import concept_files, gate_folders

        catalog = Catalog(concept_files(), gate_folders())
    elif loras is None and not experts:
        raise ValueError("give --loras FOLDER, the LoRA files for this base")
    else:
        catalog = Catalog({}, {})
    if loras is not None:
        catalog.loras |= folder_loras(loras)
    for name, file in named_values(experts, "--expert"):
        catalog.add_lora(name, Path(file))
    for name, folder in (folder_gates(trained) if trained else {}).items():
        catalog.add_gates(name, folder)
    return catalog


def target(out: Path | None, default: str, *, overwrite: bool) -> Path:
    """Where a file goes: --out, or a name of its own that is free here (grid.png, grid-2.png, ...).

    Raises ValueError where --out is there already, without --overwrite.
    """
    if out is None:
        path = Path(default)
        names = (path.with_stem(f"{path.stem}-{i}") for i in range(2, 1_000_000))
        return path if overwrite or not path.exists() else next(name for name in names if not name.exists())
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give the name of a file in it")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there already; give another --out, or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def first_recipe(studio: Studio, **changes: Any) -> Recipe:
    """A recipe at the base's own picture size and usual guidance, with those of `changes` that are not None."""
    from mole_diffusers.studio.base_models import usual_guidance
    from mole_diffusers.studio.recipe import Recipe

    side = studio.default_side
    own = {"width": side, "height": side, "guidance": usual_guidance(studio.pipe, studio.base), "base": studio.base}
    given = {name: value for name, value in changes.items() if value is not None}
    return Recipe(**{"prompt": "", "gates": "auto", **own, **given})
