"""What the commands share: options, and how pipelines, LoRAs, libraries and pictures are opened and written.

Nothing here or in a command imports torch before the command runs, so that `mole --help` answers at once.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Context, Option

if TYPE_CHECKING:
    from mole_diffusers.lora import Expert
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


BaseOption = Annotated[
    str,
    Option(metavar="MODEL", help="A diffusers pipeline: a folder or a hub id; emoji is the world in this package."),
]
DeviceOption = Annotated[str | None, Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")]
ExpertOption = Annotated[
    list[str], Option("--expert", metavar="NAME=FILE[:STRENGTH]", help="A LoRA file and the name you give it. Repeatable.")
]
TagExpertOption = Annotated[
    list[str], Option("--expert", metavar="NAME=FILE", help="One more LoRA file that tags may name. Repeatable.")
]
LorasOption = Annotated[
    Path | None,
    Option(metavar="FOLDER", help="LoRA files that tags may name. The emoji world has its own."),
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
SeedOption = Annotated[int, Option(help="The same seed gives the same picture.")]
StepsOption = Annotated[int, Option(help="Steps of the sampler: more take longer.")]
GuidanceOption = Annotated[float, Option(help="How strictly the prompt is followed.")]
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


def chosen_device(device: str | None) -> str:
    """The device of --device: by default the GPU, where there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def pipeline(base: str, device: str | None = None, *, half: bool = True) -> Any:
    """The pipeline of --base, in half precision on a GPU. Calls that take two seconds or more show a bar."""
    import torch

    device = chosen_device(device)
    with busy(f"loading {base}"):
        if base == WORLD:
            from mole_diffusers.emoji.world import emoji_world

            pipe = emoji_world(device=device).pipe
        else:
            from diffusers import DiffusionPipeline

            dtype = torch.float16 if half and device.startswith("cuda") else torch.float32
            pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(delay=2, leave=False)
    return pipe


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
    base: str, device: str | None, *, loras: Path | None, trained: Path | None, experts: Sequence[str] = ()
) -> Studio:
    """The pipeline of --base, with the LoRAs of --loras and --expert and the gates of --trained in its catalog."""
    from mole_diffusers.studio.catalog import Catalog, folder_gates, folder_loras
    from mole_diffusers.studio.render import Studio

    if base == WORLD:
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
    return Studio(pipeline(base, device), catalog, base)


def first_recipe(studio: Studio, **changes: Any) -> Recipe:
    """A recipe at the pipeline's own picture size, with `changes`."""
    from mole_diffusers.studio.recipe import Recipe

    pipe = studio.pipe
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return Recipe(**{"prompt": "", "width": side, "height": side, "gates": "auto", "base": studio.base, **changes})
