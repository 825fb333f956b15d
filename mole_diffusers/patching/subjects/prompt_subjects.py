"""What a call's prompt names, and how it is drawn alone: for tiles, and to find subjects in a given picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from diffusers import CacheMixin

from mole_diffusers.binding.config import Bound, given_region
from mole_diffusers.binding.picture_layout import regions_of_subjects
from mole_diffusers.binding.regions import region_mask
from mole_diffusers.binding.sentence import Contact, Mention, Part, why_unparted
from mole_diffusers.binding.who_acts import present, read_prompt
from mole_diffusers.binding.words import SubjectKey, keys
from mole_diffusers.patching.host.cropping import Cropping
from mole_diffusers.patching.host.denoiser_inputs import FOR_ATTENTION, denoiser, is_one_graph, lora_scale
from mole_diffusers.patching.host.denoisers import record

SINCE, UNTIL = 0.4, 0.8  # shares of the steps

AdapterSubset = Callable[[Sequence[str]], AbstractContextManager[None]]  # only these experts act, on every word
# Called with the place [H, W] of each subject, by its key. Returns whether the denoiser's text names these subjects.
SetPlaces = Callable[[Mapping[SubjectKey, torch.Tensor]], bool]
# A part of a prompt -> its text states [1, S, C], and the pooled states [1, P] that SDXL, SD 3 and Flux read, else None.
Encode = Callable[[Part], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Tiling:
    """Which steps of a picture are drawn in tiles, see `Mixture.tiled`."""

    until: float = UNTIL  # the share of the steps in 0..1, from pure noise, after which it is drawn as one; 0 for no tiles
    since: float | None = None  # the share before them; None for the usual one
    always: bool = False
    prompt: str | None = None
    encode: Encode | None = None


class PromptSubjects:
    """The subjects that a prompt lists, or two that touch.

    Attributes:
        sentence: what the prompt says. Its first subjects are those that it lists.
        parts: the prompt for each listed subject alone, in the order of naming.
        keys: of the sentence's subjects, see `words.keys`.
        contact: two subjects that touch, if nothing else has a place; then they are drawn apart, and not a list.
        apart: each subject that may be drawn apart, with its prompt.
        why_not_per_subject: "" if they may be drawn apart.
        everywhere: the indices of the experts that act besides those of these subjects, such as a style.
        outside: the names of those of them that the user gave a region.
    """

    def __init__(self, prompt: str, bound: Mapping[str, Bound], acting: Collection[str]):
        self.names, self.bound = list(bound), list(bound.values())
        on = [name in acting for name in self.names]
        self.sentence = read_prompt(prompt, self.bound, on)
        self.parts, self.keys = self.sentence.parts, list(keys(self.sentence.subjects))
        there = present(self.bound, on, self.sentence.mentioned)
        self.contact, why = self._only_contact(on)
        of = self.contact or self.sentence
        self.apart = tuple(zip(of.subjects, of.parts, strict=False))
        self.why_not_per_subject = why or ("" if self.contact else self.sentence.why_no_tiles)
        placed = {k for subject, _ in self.apart for k in subject.experts}
        self.everywhere = [k for k, acts in enumerate(there) if acts and k not in placed]
        self.outside = [self.names[k] for k in self.everywhere if self.bound[k].given is not None]

    def _only_contact(self, on: Sequence[bool]) -> tuple[Contact | None, str]:
        """The contact of two subjects without a given region, if no words of others are in the prompt, but for styles.

        And why its subjects are not drawn apart, if what is said of them is why.
        """
        if len(self.sentence.contacts) != 1:
            return None, ""
        (contact,) = self.sentence.contacts
        own = {k for subject in contact.subjects for k in subject.experts}
        spoken = [k for k, acts in enumerate(on) if acts and self.sentence.words[k]]
        if any(self.is_given(subject) for subject in contact.subjects) or not set(spoken) <= own | self.sentence.styles:
            return None, ""
        if why := why_unparted(contact.parts, contact.subjects, [self.sentence.words[k] for k in spoken]):
            return None, why
        return contact, contact.why_not_per_subject

    def is_given(self, subject: Mention) -> bool:
        """Whether the user gave a subject its region."""
        return given_region(subject, self.bound) is not None

    def drawing(self, subject: Mention, part: Part) -> tuple[str, ...]:
        """The experts that draw a subject alone: its own, and the others, unless their words stand elsewhere."""
        words = self.sentence.words
        spoken = [k for k in self.everywhere if not words[k] or any(part.has(begin) for begin, _ in words[k])]
        return tuple(self.names[k] for k in (*subject.experts, *spoken))

    def masks(self, height: int, width: int) -> torch.Tensor:
        """[K, height, width] in 0..1: the place of each subject, as given, or a cell of the rest, in the order of naming."""
        subjects, latent_size = self.sentence.subjects[: len(self.parts)], (height, width)
        regions = [given_region(subject, self.bound) for subject in subjects]
        free = [subject for subject, region in zip(subjects, regions, strict=True) if region is None]
        cells = iter(regions_of_subjects(self.sentence, free, None, self.bound, latent_size)[0]) if free else iter(())
        return torch.stack([next(cells) if region is None else region_mask(region, *latent_size) for region in regions])


@dataclass(frozen=True)
class PictureCall:
    """A call of a pipeline, as it is read for tiles and for subjects in a given picture."""

    pipe: Any
    tiling: Tiling
    given: Mapping[str, Any]  # its arguments
    bound: Mapping[str, Bound]  # each expert's words and region
    acting: Collection[str]  # the experts that are on

    @property
    def gives_states(self) -> bool:
        """Whether it gives the states of a prompt that the tiling knows."""
        return self.given.get("prompt") is None and self.tiling.prompt is not None

    @cached_property
    def subjects(self) -> PromptSubjects | None:
        """The subjects that its prompt names; None if it does not have exactly one prompt."""
        prompt = self.tiling.prompt if self.gives_states else _one_prompt(self.given.get("prompt"))
        return None if prompt is None else PromptSubjects(prompt, self.bound, self.acting)

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer of its pipeline."""
        return denoiser(self.pipe)

    @cached_property
    def cropping(self) -> Cropping:
        """How calls of the denoiser are cut; ValueError if they cannot be."""
        kind = record(self.denoiser).cropping
        if kind is None:
            raise ValueError(f"tiles are drawn by UNets, SD 3 and Flux, not by a {type(self.denoiser).__name__}")
        return kind(self.denoiser.config)

    @property
    def for_processors(self) -> list[str]:
        """What it gives attention processors besides the scale of LoRAs, such as GLIGEN's boxes."""
        return [name for given in FOR_ATTENTION for name in self.given.get(given) or {} if name != "scale"]

    @cached_property
    def obstacle(self) -> str:
        """Why the pipeline cannot draw these in tiles; "" if it can."""
        pipe, subjects = self.pipe, self.subjects
        try:
            needed = self.cropping.of_pipelines
        except ValueError as why:
            return str(why)
        if not all(hasattr(type(pipe), name) for name in needed):
            return f"tiles need {' and '.join(needed)} of the pipeline, unlike {type(pipe).__name__}"
        if is_one_graph(pipe):
            return "tiles have other sizes than the picture, and the denoiser is compiled as one graph"
        if isinstance(self.denoiser, CacheMixin) and self.denoiser.is_cache_enabled:
            return "tiles are several pictures in each step, and the denoiser's cache knows one: call disable_cache"
        if subjects is None:
            return "tiles are drawn of one prompt: call the pipeline with it, or say tiled(prompt=...)"
        if subjects.apart and subjects.outside:
            return f"{subjects.outside[0]!r} has a region, but is no subject that could be drawn in a tile there"
        return ""

    def encode(self, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text states of a part of its prompt, see `Encode`."""
        if self.tiling.encode is not None and self.gives_states:
            return self.tiling.encode(part)
        options = {"prompt": part.text, "prompt_2": None, "prompt_3": None, "device": self.pipe._execution_device}
        options |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "lora_scale": lora_scale(self.given)}
        given = {name: self.given.get(name) for name in ("clip_skip", "max_sequence_length")}
        options |= {name: value for name, value in given.items() if value is not None}
        known = inspect.signature(self.pipe.encode_prompt).parameters
        made = self.pipe.encode_prompt(**{name: value for name, value in options.items() if name in known})
        return self.cropping.encoded(made)


class PlaceSource(Protocol):
    """Where places can come from before the first step, such as a given picture."""

    def __call__(
        self, call: PictureCall, *, adapter_subset: AdapterSubset, set_places: SetPlaces
    ) -> AbstractContextManager[None] | None:
        """A block for the call, in which the source calls `set_places` once; None if it does not know this call's places.

        Inside `adapter_subset(names)` only these experts act, on every word, and without listeners.
        """


PLACE_SOURCES: list[PlaceSource] = []  # the first that knows a call's places sets them


def place_source(source: PlaceSource) -> PlaceSource:
    """Register a source of places, in a file of `subjects/place_sources/`."""
    PLACE_SOURCES.append(source)
    return source


def _one_prompt(given: Any) -> str | None:
    texts = {given} if isinstance(given, str) else set(given) if isinstance(given, list | tuple) else set()
    return texts.pop() if len(texts) == 1 else None
