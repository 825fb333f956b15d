"""Compose retrieved LoRAs: LoraRetriever's selection, mixture and fusion, for one prompt or a mixed batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch

from mole_diffusers.binding.config import files_bindings
from mole_diffusers.lora import Expert, family_of
from mole_diffusers.merging.factors import Pair, present
from mole_diffusers.merging.layers import as_expert, layers_of
from mole_diffusers.mixture import Gates, Mixture, attach, attached, detach
from mole_diffusers.patching.host.denoiser_inputs import models_of
from mole_diffusers.retrieval.library import LoraLibrary, RetrievedLora
from mole_diffusers.retrieval.modes import THRESHOLD, Mode


def retrieve_for(
    library: LoraLibrary, pipe: Any, prompt: str, *, k: int = 3, threshold: float = THRESHOLD
) -> list[RetrievedLora]:
    """`LoraLibrary.retrieve` for a pipeline: LoRAs known to be for another model family are skipped."""
    return library.retrieve(prompt, k=k, threshold=threshold, base=family_of(models_of(pipe)))


def report(library: LoraLibrary, found: Sequence[RetrievedLora]) -> list[dict[str, Any]]:
    """Results and reasons, ready for JSON: name, file, base, score, phrase, trigger (or None), passed_over, why."""
    entries = {entry.name: entry for entry in library.entries}
    return [
        {"file": entries[each.name].file, "base": entries[each.name].base, "why": each.why, **asdict(each)} for each in found
    ]


@dataclass(frozen=True)
class Composition:
    """The mixture that `composed` attached to the pipeline.

    Attributes:
        found: for each prompt, the LoRAs found, best first.
        sets: for each prompt, expert -> factor: the rows of the mapping matrix.
        mixture: the attached experts; None if no LoRA fits any prompt.
    """

    found: list[list[RetrievedLora]]
    sets: list[dict[str, float]]
    mixture: Mixture | None


@contextmanager
def composed(
    library: LoraLibrary,
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    mode: str = "sum",
    k: int = 3,
    threshold: float = THRESHOLD,
    gates: Gates = "sum",
    images: int = 1,
) -> Iterator[Composition]:
    """Inside this context, `pipe(prompts)` draws each prompt with the LoRAs that it asks for, and no others.

    The LoRAs are bound. A single prompt is also drawn in tiles if there is room (`Mixture.tiled`).

    Args:
        prompts: what you will call the pipeline with, in this order.
        mode: LoraRetriever's "selection" (only the first LoRA), "mixture" (outputs averaged, 1 / k each) or "fusion"
            (down and up matrices averaged separately, which adds cross terms). Or "sum": weight 1 each, because 1 / k
            weakens what each LoRA adds to a picture.
        k, threshold: see `LoraLibrary.retrieve`. LoRAs of another model family are skipped.
        gates: weigh the experts of each prompt, as in `attach`.
        images: the call's `num_images_per_prompt`.

    Raises ValueError for an unknown mode, LoRAs that cannot be fused, or a pipeline that already has a mixture.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}; known: {list(get_args(Mode))}")
    if attached(pipe) is not None:
        raise ValueError("the pipeline already has a mixture; detach it first")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    found = [retrieve_for(library, pipe, text, k=k, threshold=threshold) for text in texts]
    names = [[each.name for each in row] for row in found]
    experts, sets = _experts_and_sets(library, names, mode)
    # A LoRA that was found by its meaning, or by a name from the library, acts even if the prompt has none of the words
    # in its file. So does a LoRA that it was fused into.
    otherwise = {each.name for row in found for each in row if each.trigger not in library.file_triggers(each.name)}
    otherwise |= {_fused_name(row) for row in names if otherwise & set(row)}
    binding = {name: replace(b, required=name not in otherwise) for name, b in files_bindings(experts).items()}
    one = sets[0] if len(sets) == 1 else {}  # its factors become strengths: rows of several prompts are not drawn in tiles
    weighed = {name: (expert, one.get(name, 1.0)) for name, expert in experts.items()}
    mixture = attach(pipe, weighed, gates, binding=binding) if experts else None
    try:
        with nullcontext() if mixture is None or one else mixture.rows(sets, images=images):
            yield Composition(found, sets, mixture)
    finally:
        detach(pipe)


def _experts_and_sets(
    library: LoraLibrary, names: Sequence[Sequence[str]], mode: str
) -> tuple[dict[str, Expert], list[dict[str, float]]]:
    """The experts of all prompts, each once, and the factors for each prompt."""
    if mode == "selection":
        names = [row[:1] for row in names]
    experts = {name: library.expert(name) for name in dict.fromkeys(name for row in names for name in row)}
    if mode == "fusion":
        groups = {_fused_name(row): [experts[name] for name in row] for row in names if row}
        sets = [{_fused_name(row): 1.0} if row else {} for row in names]
        return {name: fused(name, group) for name, group in groups.items()}, sets
    return experts, [{name: 1 / len(row) if mode == "mixture" else 1.0 for name in row} for row in names]


def _fused_name(names: Sequence[str]) -> str:
    return "+".join(names)


def fused(name: str, experts: Sequence[Expert]) -> Expert:
    """LoraRetriever's fusion: delta W = (sum B / k)(sum A / k), including cross terms; B carries its own alpha / r.

    Raises ValueError if the experts differ in layers or ranks, since such matrices cannot be averaged.
    """
    weighted = {expert.name: (expert, 1.0) for expert in experts}
    merged = {}
    for key, layer in layers_of(weighted).items():
        ranks = {n: 0 if pair is None else pair.rank for n, pair in zip(weighted, layer, strict=True)}
        if len(set(ranks.values())) > 1:
            raise ValueError(f"{name} cannot be fused: the ranks of layer {key!r} are {ranks}; use mode 'mixture' or 'sum'")
        pairs = present(layer)
        merged[key] = Pair(torch.stack([p.down for p in pairs]).mean(0), torch.stack([p.up for p in pairs]).mean(0))
    return as_expert(merged, weighted, name=name, metadata={})
