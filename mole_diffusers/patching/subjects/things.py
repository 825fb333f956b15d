"""What a call's prompt names, and how it is drawn alone: for tiles, and to find things in a given picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mole_diffusers.binding.config import Bound, given_region, with_region
from mole_diffusers.binding.layout import MOST_THINGS
from mole_diffusers.binding.parts import Part, prompts_apart
from mole_diffusers.binding.picture_layout import planned_regions
from mole_diffusers.binding.regions import EVERYWHERE, region_mask
from mole_diffusers.binding.words import ThingKey, keys
from mole_diffusers.patching.host.denoiser_inputs import is_one_graph, lora_scale

UNTIL = 0.8  # share of the steps
OF_PIPELINES = ("encode_prompt", "do_classifier_free_guidance")

Alone = Callable[[Sequence[str]], AbstractContextManager[None]]  # only these experts act, on every word
# Called with the place [H, W] of each thing, by its key. Returns whether the denoiser's text names these things.
SetPlaces = Callable[[Mapping[ThingKey, torch.Tensor]], bool]
# A part of a prompt -> its text states [1, S, C], and the pooled states that SDXL reads [1, P], None for other models.
Encode = Callable[[Part], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Tiling:
    """Whether pictures are drawn in tiles at first.

    Attributes:
        until: share of the steps in 0..1, from pure noise; 0 for none.
        always, prompt, encode: see `Mixture.tiled`.
    """

    until: float = UNTIL
    always: bool = False
    prompt: str | None = None
    encode: Encode | None = None


class Things:
    """The things that a prompt names.

    Attributes:
        prompts: index of a thing in the reading, in the order of naming -> the prompt for it alone.
        keys: index of a thing in the reading -> its key, see `words.keys`.
        everywhere: the indices of the experts that act in the whole picture, such as a style.
        outside: the names of those of them that the user gave a region.
        are_listed: whether the prompt lists several things (see `prompts_apart`), at least one of them with an expert,
            and all experts of these things are on.
    """

    def __init__(self, prompt: str, bound: Mapping[str, Bound], acting: Collection[str]):
        self.names, self.bound, self.acting = list(bound), list(bound.values()), acting
        phrases = [b.words for b in self.bound]
        styles = [k for k, b in enumerate(self.bound) if b.region == EVERYWHERE]
        self.reading, self.prompts, side_by_side = prompts_apart(prompt, phrases, styles, whole=with_region(self.bound))
        self.keys = dict(enumerate(keys(self.reading.things)))
        placed = {k for i in self.prompts for k in self.reading.things[i].experts}
        self.everywhere = [
            k
            for k, b in enumerate(self.bound)
            if self.names[k] in acting and k not in placed and (self.reading.mentioned[k] or not b.needs_words)
        ]
        self.outside = [self.names[k] for k in self.everywhere if self.bound[k].given is not None]
        owned = [i for i in self.prompts if self.reading.things[i].experts]
        self.are_listed = side_by_side and len(self.prompts) > 1 and bool(owned) and all(map(self.experts, owned))

    def experts(self, thing: int) -> tuple[str, ...]:
        """The experts of a thing that are on."""
        return tuple(name for k in self.reading.things[thing].experts if (name := self.names[k]) in self.acting)

    def drawing(self, thing: int) -> tuple[str, ...]:
        """The experts that draw a thing alone: its own, and those that act everywhere, if its prompt has their words."""
        said = [i for i in self.prompts[thing].source if i is not None]
        own, bound = self.reading.own, self.bound
        spoken = [k for k in self.everywhere if any(own[k][i] for i in said) or not bound[k].needs_words]
        return (*self.experts(thing), *(self.names[k] for k in spoken))

    def masks(self, height: int, width: int) -> torch.Tensor:
        """[K, height, width] in 0..1: the place of each thing, as given, or a cell of the rest, in the order of naming."""
        things, side = self.reading.things, (height, width)
        regions = {i: given_region(things[i], self.bound) for i in self.prompts}
        masks = {i: region_mask(region, *side) for i, region in regions.items() if region is not None}
        free = [i for i in self.prompts if i not in masks]
        if free:
            places, _ = planned_regions(self.reading, [things[i] for i in free], None, self.bound, side)
            masks |= dict(zip(free, places, strict=True))
        return torch.stack([masks[i] for i in self.prompts])


@dataclass(frozen=True)
class Asked:
    """A call of a pipeline, as it is read for tiles and for things in a given picture.

    Attributes:
        call: its arguments.
        bound: each expert's words and region.
        acting: the experts that are on.
    """

    pipe: Any
    tiling: Tiling
    call: Mapping[str, Any]
    bound: Mapping[str, Bound]
    acting: Collection[str]

    @property
    def gives_states(self) -> bool:
        """Whether it gives the states of a prompt that the tiling knows."""
        return self.call.get("prompt") is None and self.tiling.prompt is not None

    @cached_property
    def things(self) -> Things | None:
        """The things that its prompt names; None if it does not have exactly one prompt."""
        prompt = self.tiling.prompt if self.gives_states else _one_prompt(self.call.get("prompt"))
        return None if prompt is None else Things(prompt, self.bound, self.acting)

    @property
    def for_processors(self) -> list[str]:
        """What it gives attention processors besides the scale of LoRAs, such as GLIGEN's boxes."""
        return [name for name in self.call.get("cross_attention_kwargs") or {} if name != "scale"]

    @property
    def obstacle(self) -> str:
        """Why the pipeline cannot draw these in tiles; "" if it can."""
        pipe, things = self.pipe, self.things
        if getattr(pipe, "unet", None) is None or not all(hasattr(type(pipe), name) for name in OF_PIPELINES):
            return f"tiles need a unet, and {' and '.join(OF_PIPELINES)} of the pipeline, unlike {type(pipe).__name__}"
        if is_one_graph(pipe):
            return "tiles have other sizes than the picture, and the unet is compiled as one graph"
        if things is None:
            return "tiles are drawn of one prompt: call the pipeline with it, or say tiled(prompt=...)"
        if (count := len(things.prompts)) > MOST_THINGS:
            return f"{MOST_THINGS} things can have tiles of their own, and the prompt names {count}"
        if count > 1 and things.outside:
            return f"{things.outside[0]!r} has a region, but is no thing that could be drawn in a tile there"
        return ""

    def encode(self, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text states of a part of its prompt, see `Encode`."""
        if self.tiling.encode is not None and self.gives_states:
            return self.tiling.encode(part)
        given = {"clip_skip": self.call.get("clip_skip"), "lora_scale": lora_scale(self.call)}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        device = self.pipe._execution_device
        made = self.pipe.encode_prompt(
            prompt=part.text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, **options
        )
        return made[0], made[2] if len(made) == 4 else None


def _one_prompt(given: Any) -> str | None:
    texts = {given} if isinstance(given, str) else set(given) if isinstance(given, list | tuple) else set()
    return texts.pop() if len(texts) == 1 else None
