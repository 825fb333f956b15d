"""`mole index`, `retrieve` and `compose-library`: find the LoRAs for a prompt in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mole_app.studio.names import WORLD
from mole_cli import options
from mole_cli.commands import Given, Group, Result
from mole_cli.common import opened, target
from mole_cli.compose import PromptSheet, SheetOptions
from mole_diffusers.retrieval import THRESHOLD, Mode

if TYPE_CHECKING:
    from mole_diffusers.retrieval import LoraLibrary, RetrievedLora

Encoder = Annotated[
    str | None,
    Option(metavar="MODEL", help="a sentence-transformers model that reads texts. Default: the text encoder of --base."),
]


@dataclass
class Search(Group):
    """How LoRAs are found.

    Attributes:
        library (FOLDER): a folder that `mole index` has indexed.
        k: find at most this many LoRAs. LoRAs whose trigger words are in the prompt always count.
        threshold: similarity that a LoRA needs if its trigger words are not in the prompt.
    """

    library: Annotated[Path, Option(exists=True, file_okay=False)]
    k: options.AtLeastOne = 3
    threshold: float = THRESHOLD
    encoder: Encoder = None


def index(
    library: Annotated[Path, Argument(exists=True, file_okay=False)],
    encoder: Encoder = None,
    base: options.Base = WORLD,
    *,
    machine: options.Machine,
    given: Given,
) -> Result:
    """Index a folder of LoRAs as a library, so that prompts can find the LoRAs they need.

    Args:
        library (FOLDER): LoRA files, in subfolders too.
    """
    given.check_beside("encoder", ["library"], "reads the texts, and no base is opened")
    from mole_diffusers.retrieval import LoraLibrary, PipelineText, SentenceText

    made = LoraLibrary.index(library, SentenceText(encoder) if encoder else PipelineText(opened(base, machine).pipe))
    words = [f"{library}: {len(made.entries)} LoRAs", *(f"left out {file}: {why}" for file, why in made.skipped.items())]
    return Result({"loras": [entry.name for entry in made.entries], "skipped": made.skipped}, "\n".join(words))


def retrieve(prompt: str, base: options.Base = WORLD, *, search: Search, machine: options.Machine) -> Result:
    """Show which LoRAs of a library fit a prompt, and why.

    Args:
        prompt: what you want to draw.
    """
    from mole_app.studio.weight_syntax import plain_text
    from mole_diffusers.retrieval import report, retrieve_for

    pipe = opened(base, machine).pipe
    library = open_library(search, pipe)
    found = retrieve_for(library, pipe, plain_text(prompt), k=search.k, threshold=search.threshold)
    return Result(report(library, found), in_words(found, library))


def compose_library(prompt: str, mode: Mode = "sum", gates: str = "sum", *, search: Search, sheet: SheetOptions) -> Result:
    """Find the LoRAs for a prompt in a library, and draw it without and with them.

    The LoRAs are bound, and drawn in tiles if there is room, as in mole draw.

    Args:
        prompt: what to draw.
        mode: sum: each LoRA at its full strength. mixture: each at 1/N. selection: the best one. fusion: merged.
        gates: trained gates (a folder or a hub id), or a family.
    """
    from mole_app.studio.prompt_weights import tiled_prompt
    from mole_app.studio.weight_syntax import plain_text
    from mole_diffusers.retrieval import composed, report

    if "<lora:" in prompt:
        raise ValueError("the library chooses the LoRAs; leave <lora:...> tags out of the prompt")
    path = target(sheet, "grid.png")
    page = PromptSheet(prompt, sheet)
    library = open_library(search, page.pipe)
    page.columns["base"] = ()  # the first column, drawn last: LoRAs that do not go together are said before
    asked: dict[str, Any] = {"mode": mode, "k": search.k, "threshold": search.threshold, "gates": gates}
    with composed(library, page.pipe, plain_text(prompt), **asked) as composition:
        mixture = composition.mixture
        tiles = tiled_prompt(page.pipe, **page.recipe.call)
        with nullcontext() if mixture is None else mixture.tiled(always=False, **tiles):
            page.draw(f"found ({mode})")
    page.draw("base")
    found, weights = composition.found[0], composition.sets[0]
    facts = page.save(path, found=report(library, found), weights=weights, mode=mode, gates=gates)
    shares = ", ".join(f"{name} x {weight:.3g}" for name, weight in weights.items()) or "the base alone"
    return Result(facts, f"{in_words(found, library)}\ndrawn with {shares}, {mode}: {path}")


def open_library(search: Search, pipe: Any) -> LoraLibrary:
    """The library of --library, with the encoder of --encoder."""
    from mole_diffusers.retrieval import LoraLibrary, PipelineText, SentenceText

    return LoraLibrary.open(search.library, SentenceText(search.encoder) if search.encoder else PipelineText(pipe))


def in_words(found: Sequence[RetrievedLora], library: LoraLibrary) -> str:
    """One line per LoRA: its name, and why it was chosen."""
    if not found:
        return f"the prompt asks for none of the {len(library.entries)} LoRAs in {library.folder}"
    return "\n".join(f"{each.name}: {each.why}" for each in found)
