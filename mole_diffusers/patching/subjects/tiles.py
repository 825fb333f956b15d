"""Several subjects in one picture: a layout of the whole, then each subject in its own tile, then the whole again.

The first steps decide horizon, light and places, so that there is one scene. In the steps that decide what a subject is, the
model only has to draw one at a time. The last steps join the parts.

The steps in tiles are Mixture of Diffusers (Jimenez 2023, arXiv 2302.02412) with separate LoRAs for each region. Where two
tiles overlap, a silhouette divides them instead of a weighted mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F

from mole_diffusers.binding.picture_warning import PictureWarning
from mole_diffusers.binding.regions import GridSize
from mole_diffusers.binding.sentence import Part
from mole_diffusers.functional import onto
from mole_diffusers.gates.unchanged import LastTensor
from mole_diffusers.patching.hooks import replaced_forward
from mole_diffusers.patching.host.cropping import OF_WHOLE_SIZE, Call
from mole_diffusers.patching.host.denoiser_inputs import DenoiserInputs, GuidanceLayout, guidance_layout_of, guides_in_turns
from mole_diffusers.patching.subjects.per_subject import OTHER_SUBJECTS, SCALE_ONLY, cut, part_of_step
from mole_diffusers.patching.subjects.prompt_subjects import AdapterSubset, PictureCall, PromptSubjects, SetPlaces
from mole_diffusers.patching.subjects.sampler_steps import SamplerSteps
from mole_diffusers.patching.subjects.windows import STEADY, Window, silhouette

CHANGED = "the prompt's states, or SDXL's sizes, were changed between two steps, and tiles have prompts of their own"


@dataclass(frozen=True)
class Tile:
    """A part of the picture with its own prompt."""

    names: tuple[str, ...]  # the experts that draw it
    text: torch.Tensor  # its prompt's states, [1, S, C]
    pooled: torch.Tensor | None  # [1, P], the pooled states that SDXL, SD 3 and Flux read; None for other models
    window: Window


@dataclass(frozen=True)
class TileInputs:
    """What tiles read, and how much they count, in all steps of a text, on its device."""

    texts: Sequence[torch.Tensor]  # [B, S, C] each: its own in the rows that are prompts, and the call's in the others
    conditions: Sequence[Mapping[str, Any]]  # the other arguments that a tile has of its own, for each
    shares: torch.Tensor  # [K, H, W], how much each tile counts at a place
    outside: torch.Tensor | None  # [H, W], how much the picture as a whole does; None if it counts nowhere
    border: torch.Tensor | None  # [H, W] bool, where the silhouette of the subject in front decides whose a place is
    guidance_layout: GuidanceLayout  # how guidance has combined the rows


@dataclass
class KeptInputs:
    """What was made of texts that come again in the next steps."""

    last: Sequence[LastTensor] = field(default_factory=lambda: tuple(LastTensor() for _ in range(3)))
    inputs: dict[bool, TileInputs] = field(default_factory=dict)  # of the tiles, and under True of the layout
    first: Sequence[torch.Tensor] = ()  # [S, C] and perhaps [P] and sizes, of a prompt in the first texts
    is_as_first: bool = True  # whether the last texts have the same

    def read(self, states: Sequence[torch.Tensor], row: int) -> None:
        """Forget what was made of other texts: [B, S, C], and what comes beside. A prompt is in this row of all."""
        are_again = [last.is_again(given) for last, given in zip(self.last, states, strict=False)]  # each remembers its own
        if not all(are_again):
            self.inputs.clear()
            own = [given[row] for given in states]
            self.first = self.first or own
            self.is_as_first = all(map(torch.equal, own, self.first))


@dataclass(frozen=True)
class Plan:
    """How the steps of pictures of one size are drawn."""

    latent_size: GridSize
    tiles: Sequence[Tile]
    since: float  # share of the steps before the tiles
    border: torch.Tensor | None  # [H, W] bool, where silhouettes divide two tiles that overlap
    front: int  # which of the tiles that is
    layout: Tile | None  # draws the steps before the tiles; None for the picture as it is drawn without tiles


class Tiles:
    """The denoiser's calls for each subject of a prompt, see `Mixture.tiled`. First, `set_places` gets their places."""

    def __init__(self, call: PictureCall, subjects: PromptSubjects, adapter_subset: AdapterSubset, set_places: SetPlaces):
        self.call, self.subjects, self.adapter_subset, self.set_places = call, subjects, adapter_subset, set_places
        self.reader, self._steps = DenoiserInputs(call.denoiser), SamplerSteps()
        # (shape of the latents, tokens of the text, what ControlNets give) -> how they are drawn; None if as one picture.
        self._plans: dict[tuple[torch.Size, int, tuple[str, ...]], Plan | None] = {}
        self._turns = cycle((False, True) if guides_in_turns(call.given) else (False,))  # whether a call is of the negatives
        self._kept = {False: KeptInputs(), True: KeptInputs()}  # of the prompts' calls, and of those of the negatives
        self._in_front: torch.Tensor | None = None  # [P, h, w], the silhouette of the subject in front, over the steps

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """While the block runs, the denoiser is called for each tile in the steps that `Tiling` says."""
        with replaced_forward(self.call.denoiser, partial(self._denoise, self.call.denoiser.forward)):
            yield

    def _denoise(self, whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The denoiser's prediction; `whole` draws the picture as one."""
        call, is_negative = self.reader.named(args, kwargs), next(self._turns)
        if (plan := self._plan(call)) is None:
            return whole(*args, **kwargs)
        times = self.call.pipe.scheduler.timesteps
        step = self._steps.begun(times, self.reader.timestep((), call), lambda: float(self.reader.time((), call)[0]))
        part = part_of_step(step, len(times), self.call.tiling, plan.since)
        states = [self.reader.text((), call), *self.call.cropping.beside_text(call)]
        self._kept[is_negative].read(states, 0 if self.reader.record.pipelines.prompts_first else -1)
        is_layout, is_changed = part == "layout", not self._kept[False].is_as_first
        is_whole = part == "whole" or (is_layout and plan.layout is None)
        if is_changed and not is_whole:
            if self.call.tiling.always:
                raise ValueError(CHANGED)
            warnings.warn(f"{CHANGED}: the other steps draw one picture", PictureWarning, stacklevel=2)
        if is_whole or is_changed:
            self._in_front = None
            return whole(*args, **kwargs)
        out = self._parts(plan, whole, call, is_layout=is_layout, is_negative=is_negative)
        return self.call.cropping.output(sample=out) if call.get("return_dict", True) else (out,)

    def _plan(self, call: Call) -> Plan | None:
        """How a call is drawn in tiles; None if it draws the picture as one."""
        latents, tokens = self.reader.latents((), call), self.reader.text((), call).shape[1]
        key = latents.shape[1:], tokens, tuple(name for name in OF_WHOLE_SIZE if call.get(name) is not None)
        if key not in self._plans:
            latent_size = self.reader.latent_size((), call)
            assert latent_size is not None  # what can be cut says its size
            reason = self.call.cropping.obstacle(call, latents, latent_size)
            if reason and self.call.tiling.always:
                raise ValueError(reason)
            self._plans[key] = None if reason else self._plan_at(latent_size, tokens)
        return self._plans[key]

    def _plan_at(self, latent_size: GridSize, tokens: int) -> Plan | None:
        subjects = self.subjects
        if (found := cut(self.call, subjects, *latent_size)) is None:
            return None
        if self.call.for_processors:
            why = SCALE_ONLY.format(self.call.for_processors[0])
            warnings.warn(f"{why}, so this is drawn as one picture", PictureWarning, stacklevel=2)
            return None
        for (subject, _), window in zip(subjects.apart, found.windows, strict=True):
            if not window.mask.any():
                raise ValueError(f"the regions leave no place for {subject.name!r}")
        tiles = []
        for (subject, part), window in zip(subjects.apart, found.windows, strict=True):
            names = subjects.drawing(subject, part)
            tiles.append(Tile(names, *self._encoded(part, names), window))
        if why := self._why_not(tiles, tokens):
            if self.call.tiling.always:
                raise ValueError(why)
            return None
        if subjects.contact is None:
            return Plan(latent_size, tiles, found.since, found.border, front=0, layout=None)
        return Plan(latent_size, tiles, found.since, found.border, subjects.contact.front, self._layout(*latent_size))

    def _why_not(self, tiles: Sequence[Tile], tokens: int) -> str:
        """Why a text of so many tokens cannot be drawn in these tiles; "" if it can, and then listed subjects have
        places.
        """
        if any((short := tile.text.shape[1]) != tokens for tile in tiles):
            return f"tiles read prompts of {short} tokens, and this one has {tokens}: shorten it"
        places = {key: tile.window.mask for key, tile in zip(self.subjects.keys, tiles, strict=False)}
        if not self.subjects.sentence.subjects or self.set_places(places):
            return ""
        named = " and ".join(repr(subject.name) for subject, _ in self.subjects.apart)
        return OTHER_SUBJECTS.format(named)

    def _layout(self, height: int, width: int) -> Tile:
        """The whole picture without the LoRAs of its subjects: the base knows better than they how two touch."""
        names = tuple(self.subjects.names[k] for k in self.subjects.everywhere)
        text = self.subjects.sentence.text
        whole = Window(torch.ones(height, width), (0, height, 0, width))
        return Tile(names, *self._encoded(Part(text, ((0, len(text)),)), names), whole)

    def _encoded(self, part: Part, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad(), self.adapter_subset(names):
            return self.call.encode(part)

    def _parts(
        self, plan: Plan, whole: Callable[..., Any], call: Call, *, is_layout: bool, is_negative: bool
    ) -> torch.Tensor:
        """The denoiser's prediction, tile by tile, or of the layout. Outside of all tiles it is that of `whole`, where words
        of listed subjects are masked.
        """
        tiles = [plan.layout] if is_layout and plan.layout else plan.tiles
        latents, text = self.reader.latents((), call), self.reader.text((), call)
        kept = self._kept[is_negative]
        if is_layout not in kept.inputs or kept.inputs[is_layout].shares.shape[1:] != plan.latent_size:
            guidance_layout = (False,) if is_negative else guidance_layout_of(self.call.pipe, text, latents) or (True,)
            divided = None if is_layout else plan.border
            kept.inputs[is_layout] = self._inputs_of(tiles, divided, guidance_layout, call, plan.latent_size)
        inputs, call = kept.inputs[is_layout], {**call, "return_dict": False}
        grid = self.call.cropping.to_grid(latents, plan.latent_size)  # [B, C, H, W], one place for each token
        # The whole must come first: hooks have noted its noise level and what gates outside of blocks read when the denoiser
        # was called (`StepHook`, `ModelInput`). They run again for each tile, and note the tile's instead.
        rest = (
            None
            if inputs.outside is None
            else inputs.outside * self.call.cropping.to_grid(whole(**call)[0], plan.latent_size)
        )
        parts = [self._part(tile, i, inputs, call, grid) for i, tile in enumerate(tiles)]
        shares = list(inputs.shares)
        if inputs.border is not None:
            shares = self._by_silhouette(plan, inputs.border, parts, inputs)
        # An inpainting model predicts fewer channels than it reads.
        out = grid.new_zeros(len(grid), parts[0].shape[1], *plan.latent_size) if rest is None else rest
        for tile, part, share in zip(tiles, parts, shares, strict=True):
            top, bottom, left, right = tile.window.box
            out[..., top:bottom, left:right] += share[..., top:bottom, left:right] * part
        return self.call.cropping.from_grid(out)

    def _part(self, tile: Tile, number: int, inputs: TileInputs, call: Call, grid: torch.Tensor) -> torch.Tensor:
        """The denoiser's prediction for one tile of its input on the grid of its tokens, [B, C, h, w]."""
        (top, bottom, left, right), names = tile.window.box, self.reader.record.arguments
        own = {
            names.latents: self.call.cropping.from_grid(grid[..., top:bottom, left:right]),
            names.text: inputs.texts[number],
            **self.call.cropping.ids(call, tile.window.box, (grid.shape[2], grid.shape[3])),
        }
        with self.adapter_subset(tile.names):
            found = self.call.denoiser(**{**call, **inputs.conditions[number], **own})[0]
        return self.call.cropping.to_grid(found, (bottom - top, right - left))

    def _by_silhouette(
        self, plan: Plan, border: torch.Tensor, parts: Sequence[torch.Tensor], inputs: TileInputs
    ) -> list[torch.Tensor]:
        """How much two tiles count, [B, 1, H, W] each: at their border, the silhouette of the subject in front decides."""
        guidance_layout, shares = inputs.guidance_layout, list(inputs.shares)
        if set(guidance_layout) != {True, False}:
            return shares  # without guidance, nothing tells a subject from what is around it
        rows = parts[plan.front].chunk(len(guidance_layout))
        outline = silhouette(rows[guidance_layout.index(True)] - rows[guidance_layout.index(False)])
        if self._in_front is not None and self._in_front.shape == outline.shape:
            outline = STEADY * self._in_front + (1 - STEADY) * outline
        self._in_front = outline
        top, bottom, left, right = plan.tiles[plan.front].window.box
        height, width = shares[0].shape
        inside = F.pad(outline, (left, width - right, top, height - bottom)).to(shares[0])  # [P, H, W]
        inside = inside.repeat(len(guidance_layout), 1, 1)[:, None]  # [B, 1, H, W]
        shares[plan.front] = torch.where(border, inside, shares[plan.front])
        shares[1 - plan.front] = torch.where(border, 1 - inside, shares[1 - plan.front])
        return shares

    def _inputs_of(
        self,
        tiles: Sequence[Tile],
        border: torch.Tensor | None,
        guidance_layout: GuidanceLayout,
        call: Call,
        latent_size: GridSize,
    ) -> TileInputs:
        latents, text = self.reader.latents((), call), self.reader.text((), call)
        # [B]
        prompted = torch.tensor(guidance_layout, device=text.device).repeat_interleave(len(text) // len(guidance_layout))
        texts = [torch.where(prompted[:, None, None], tile.text.to(text), text) for tile in tiles]
        masks = torch.stack([tile.window.mask for tile in tiles])  # [K, H, W]
        outside = (1 - masks.sum(0)).clamp_min(0)
        if border is not None and set(guidance_layout) == {True, False}:  # silhouettes share all of it
            outside, border = outside.masked_fill(border, 0), onto(border, latents.device)
        shares = (masks / masks.sum(0).clamp_min(1)).to(latents)
        pixels = self.call.pipe.vae_scale_factor
        conditions = [
            self.call.cropping.conditions(call, tile.pooled, prompted, tile.window.box, latent_size, pixels)
            for tile in tiles
        ]
        return TileInputs(texts, conditions, shares, outside.to(latents) if outside.any() else None, border, guidance_layout)
