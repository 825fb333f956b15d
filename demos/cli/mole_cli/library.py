"""`mole index`, `retrieve` and `compose-library`: find the LoRAs for a prompt in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from mole_app.studio.names import WORLD
from mole_cli import options
from mole_cli.common import opened, target
from mole_cli.compose import PromptSheet
from mole_cli.console import show

if TYPE_CHECKING:
    from mole_diffusers.retrieval import LoraLibrary, RetrievedLora


def index(
    library: Annotated[
        Path, Argument(metavar="FOLDER", exists=True, file_okay=False, help="LoRA files, in subfolders too.")
    ],
    encoder: options.Encoder = None,
    base: options.IndexBase = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Index a folder of LoRAs as a library, so that prompts can find the LoRAs they need."""
    opening = {"base": base, "device": device, "base-config": base_config}
    if encoder and (unread := [f"--{name}" for name, value in opening.items() if value is not None]):
        raise ValueError(f"--encoder reads the texts, and no base is opened: leave out {', '.join(unread)}")
    from mole_diffusers.retrieval import LoraLibrary, PipelineText, SentenceText

    asked = {"device": device, "base_config": base_config}
    made = LoraLibrary.index(library, SentenceText(encoder) if encoder else PipelineText(opened(base or WORLD, asked).pipe))
    words = [f"{library}: {len(made.entries)} LoRAs", *(f"left out {file}: {why}" for file, why in made.skipped.items())]
    facts = {"loras": [entry.name for entry in made.entries], "skipped": made.skipped}
    show(facts, "\n".join(words), as_json=as_json)


def retrieve(
    prompt: Annotated[str, Argument(help="what you want to draw.")],
    library: options.Library,
    base: options.Base = "emoji",
    k: options.K = 3,
    threshold: options.Threshold = 0.8,
    encoder: options.Encoder = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Show which LoRAs of a library fit a prompt, and why."""
    from mole_app.studio.weight_syntax import plain_text
    from mole_diffusers.retrieval import report, retrieve_for

    pipe = opened(base, {"device": device, "base_config": base_config}).pipe
    indexed = open_library(library, encoder, pipe)
    found = retrieve_for(indexed, pipe, plain_text(prompt), k=k, threshold=threshold)
    show(report(indexed, found), in_words(found, indexed), as_json=as_json)


def compose_library(
    prompt: options.Prompt,
    library: options.Library,
    mode: Annotated[
        Literal["selection", "mixture", "sum", "fusion"],
        Option(help="sum: each LoRA at its full strength. mixture: each at 1/N. selection: the best one. fusion: merged."),
    ] = "sum",
    gates: Annotated[str, Option(help="trained gates (a folder or a hub id), or a gate type.")] = "sum",
    k: options.K = 3,
    threshold: options.Threshold = 0.8,
    encoder: options.Encoder = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    negative: options.Negative = None,
    prompt_2: options.Prompt2 = None,
    negative_2: options.Negative2 = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    width: options.Width = None,
    height: options.Height = None,
    sampler: options.Sampler = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    compiled: options.Compiled = False,
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    slicing: options.Slicing = None,
    tiling: options.Tiling = None,
    base: options.Base = "emoji",
    seed: options.FirstSeed = 0,
    rows: options.Rows = 4,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Find the LoRAs for a prompt in a library, and draw it without and with them.

    The LoRAs are bound, and drawn in tiles if there is room, as in mole draw.
    """
    from mole_app.studio.prompt_weights import tiled_prompt
    from mole_app.studio.weight_syntax import plain_text
    from mole_diffusers.retrieval import composed, report

    how = dict(locals())
    if "<lora:" in prompt:
        raise ValueError("the library chooses the LoRAs; leave <lora:...> tags out of the prompt")
    path = target(out, "grid.png", overwrite=overwrite)
    page = PromptSheet(prompt, how)
    indexed = open_library(library, encoder, page.pipe)
    page.columns["base"] = ()  # the first column, drawn last: LoRAs that do not go together are said before
    asked: dict[str, Any] = {"mode": mode, "k": k, "threshold": threshold, "gates": gates}
    with composed(indexed, page.pipe, plain_text(prompt), **asked) as composition:
        mixture = composition.mixture
        tiles = tiled_prompt(page.pipe, **page.recipe.call)
        with nullcontext() if mixture is None else mixture.tiled(always=False, **tiles):
            page.draw(f"found ({mode})")
    page.draw("base")
    found, weights = composition.found[0], composition.sets[0]
    facts = page.save(path, found=report(indexed, found), weights=weights, mode=mode, gates=gates)
    shares = ", ".join(f"{name} x {weight:.3g}" for name, weight in weights.items()) or "the base alone"
    show(facts, f"{in_words(found, indexed)}\ndrawn with {shares}, {mode}: {path}", as_json=as_json)


def open_library(folder: Path, encoder: str | None, pipe: Any) -> LoraLibrary:
    """The library of --library, with the encoder of --encoder."""
    from mole_diffusers.retrieval import LoraLibrary, PipelineText, SentenceText

    return LoraLibrary.open(folder, SentenceText(encoder) if encoder else PipelineText(pipe))


def in_words(found: Sequence[RetrievedLora], library: LoraLibrary) -> str:
    """One line per LoRA: its name, and why it was chosen."""
    if not found:
        return f"the prompt asks for none of the {len(library.entries)} LoRAs in {library.folder}"
    return "\n".join(f"{each.name}: {each.why}" for each in found)
