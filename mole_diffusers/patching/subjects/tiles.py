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
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from mole_diffusers.binding.picture_warning import PictureWarning
from mole_diffusers.binding.sentence import Part
from mole_diffusers.functional import onto
from mole_diffusers.gates.unchanged import LastTensor
from mole_diffusers.patching.host.denoiser_inputs import OF_WHOLE_SIZE, DenoiserInputs, Groups, groups_of
from mole_diffusers.patching.subjects.apart import SCALE_ONLY, border, have_room, since_of, windows_of
from mole_diffusers.patching.subjects.things import Alone, PictureCall, PromptThings, SetPlaces
from mole_diffusers.patching.subjects.windows import STEADY, Window, silhouette
from mole_diffusers.patching.undo import replaced_forward

SIZES = 6  # numbers that SDXL's UNet is told of them; its refiner reads others


@dataclass(frozen=True)
class Tile:
    """A part of the picture with its own prompt."""

    names: tuple[str, ...]  # the experts that draw it
    text: torch.Tensor  # its prompt's states, [1, S, C]
    pooled: torch.Tensor | None  # [1, P], the pooled states that SDXL reads; None for other models
    window: Window


@dataclass(frozen=True)
class TileInputs:
    """What tiles read, and how much they count, in all steps of a text, on its device."""

    texts: Sequence[torch.Tensor]  # [B, S, C] each: its own in the rows that are prompts, and the call's in the others
    added: Sequence[Mapping[str, torch.Tensor]]  # what SDXL reads besides, for each tile; none for other models
    shares: torch.Tensor  # [K, H, W], how much each tile counts at a place
    outside: torch.Tensor | None  # [H, W], how much the picture as a whole does; None if it counts nowhere
    border: torch.Tensor | None  # [H, W] bool, where the silhouette of the thing in front decides whose a place is
    groups: Groups  # how guidance has combined the rows


@dataclass(frozen=True)
class Plan:
    """How the steps of pictures of one size are drawn."""

    tiles: Sequence[Tile]
    since: float  # share of the steps before the tiles
    border: torch.Tensor | None  # [H, W] bool, where silhouettes divide two tiles that overlap
    front: int  # which of the tiles that is
    layout: Tile | None  # draws the steps before the tiles; None for the picture as it is drawn without tiles


class Tiles:
    """The denoiser's calls for each thing of a prompt, see `Mixture.tiled`. First, `set_places` gets their places."""

    def __init__(self, call: PictureCall, things: PromptThings, alone: Alone, set_places: SetPlaces):
        self.call, self.things, self.alone, self.set_places = call, things, alone, set_places
        self.reader = DenoiserInputs(call.pipe.unet)
        # (height, width of the latents, tokens of the text) -> how they are drawn; None if the picture is drawn as one.
        self._plans: dict[tuple[int, int, int], Plan | None] = {}
        self._text = LastTensor()
        self._inputs: dict[bool, TileInputs] = {}  # of the layout and of the tiles, for this text
        self._in_front: torch.Tensor | None = None  # [P, h, w], the silhouette of the thing in front, over the steps
        self._schedule = LastTensor()
        self._levels: list[float] = []  # of noise, for each timestep of this schedule

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """While the block runs, the UNet is called for each tile in the steps that `Tiling` says."""
        with replaced_forward(self.call.pipe.unet, partial(self._denoise, self.call.pipe.unet.forward)):
            yield

    def _denoise(self, whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The UNet's prediction; `whole` draws the picture as one."""
        if (plan := self._plan(args, kwargs)) is None:
            return whole(*args, **kwargs)
        begun, total = self._steps_until_here(args, kwargs)
        before = plan.since * total if self.call.tiling.since is not None else max(1, plan.since * total)
        is_layout = begun <= before + 1e-5
        if begun > self.call.tiling.until * total + 1e-5 or (is_layout and plan.layout is None):
            self._in_front = None
            return whole(*args, **kwargs)
        out = self._parts(plan, is_layout, whole, args, kwargs)
        return UNet2DConditionOutput(sample=out) if kwargs.get("return_dict", True) else (out,)

    def _steps_until_here(self, args: tuple, kwargs: dict) -> tuple[int, int]:
        """The number of steps including this one, and of all. Of those at one noise level, the last counts."""
        times = self.call.pipe.scheduler.timesteps
        if not self._schedule.is_again(times):
            self._levels = (times.float() / self.reader.record.pure_noise).tolist()
        index = _position(self.reader.timestep(args, kwargs), times)
        now = float(self.reader.time(args, kwargs)[0]) if index is None else self._levels[index]
        return sum(level > now - 1e-5 for level in self._levels), len(times)

    def _plan(self, args: tuple, kwargs: dict) -> Plan | None:
        """How a call is drawn in tiles; None if it draws the picture as one."""
        latents, text, reason = self.reader.latents(args, kwargs), self.reader.text(args, kwargs), ""
        if any(kwargs.get(name) is not None for name in OF_WHOLE_SIZE):
            reason = "a ControlNet sees the whole picture, and tiles are parts of it: draw without one of them"
        elif latents.dim() != 4:
            reason = "tiles are parts of a picture, and this is a video"
        elif (ids := (kwargs.get("added_cond_kwargs") or {}).get("time_ids")) is not None and ids.shape[-1] != SIZES:
            reason = f"tiles tell SDXL their size in {SIZES} numbers, and this UNet reads {ids.shape[-1]}, as refiners do"
        if reason and self.call.tiling.always:
            raise ValueError(reason)
        if reason:
            return None
        size = (*latents.shape[-2:], text.shape[1])
        if size not in self._plans:
            self._plans[size] = self._plan_at(*size)
        return self._plans[size]

    def _plan_at(self, height: int, width: int, tokens: int) -> Plan | None:
        things, always, unet = self.things, self.call.tiling.always, self.call.pipe.unet
        windows = windows_of(unet, things, height, width)
        if not always and not have_room(unet, windows):
            return None
        if self.call.for_processors:
            why = SCALE_ONLY.format(self.call.for_processors[0])
            warnings.warn(f"{why}, so this is drawn as one picture", PictureWarning, stacklevel=2)
            return None
        for (thing, _), window in zip(things.apart, windows, strict=True):
            if not window.mask.any():
                raise ValueError(f"the regions leave no place for {thing.name!r}")
        tiles = []
        for (thing, part), window in zip(things.apart, windows, strict=True):
            names = things.drawing(thing, part)
            tiles.append(Tile(names, *self._encoded(part, names), window))
        why = self._why_not(tiles, tokens)
        if why and always:
            raise ValueError(why)
        if why:
            return None
        divided, contact = border(unet, things, windows), things.contact
        since = since_of(self.call.tiling, divided)
        if contact is None:
            return Plan(tiles, since, divided, front=0, layout=None)
        return Plan(tiles, since, divided, contact.front, self._layout(height, width))

    def _why_not(self, tiles: Sequence[Tile], tokens: int) -> str:
        """Why a text of so many tokens cannot be drawn in these tiles; "" if it can, and then listed things have places."""
        if any((short := tile.text.shape[1]) != tokens for tile in tiles):
            return f"tiles read prompts of {short} tokens, and this one has {tokens}: shorten it"
        places = {key: tile.window.mask for key, tile in zip(self.things.keys, tiles, strict=False)}
        if not self.things.sentence.things or self.set_places(places):
            return ""
        named = " and ".join(repr(thing.name) for thing, _ in self.things.apart)
        return f"the text encoder reads other things in this prompt than {named}: shorten or reword it"

    def _layout(self, height: int, width: int) -> Tile:
        """The whole picture without the LoRAs of its things: the base knows better than they how two touch."""
        names = tuple(self.things.names[k] for k in self.things.everywhere)
        text = self.things.sentence.text
        whole = Window(torch.ones(height, width), (0, height, 0, width))
        return Tile(names, *self._encoded(Part(text, ((0, len(text)),)), names), whole)

    def _encoded(self, part: Part, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad(), self.alone(names):
            return self.call.encode(part)

    def _parts(self, plan: Plan, is_layout: bool, whole: Callable[..., Any], args: tuple, kwargs: dict) -> torch.Tensor:
        """The UNet's prediction, tile by tile, or of the layout. Outside of all tiles it is that of `whole`, where words of
        listed things are closed.
        """
        tiles = [plan.layout] if is_layout and plan.layout else plan.tiles
        latents, text = self.reader.latents(args, kwargs), self.reader.text(args, kwargs)
        if not self._text.is_again(text):
            self._inputs = {}
        if is_layout not in self._inputs or self._inputs[is_layout].shares.shape[1:] != latents.shape[2:]:
            divided = None if is_layout else plan.border
            self._inputs[is_layout] = self._inputs_of(tiles, divided, text, latents, kwargs.get("added_cond_kwargs"))
        inputs = self._inputs[is_layout]
        call = dict(zip(self.reader.names, args, strict=False)) | kwargs | {"return_dict": False}
        channels = self.call.pipe.unet.config.out_channels  # fewer than the inputs of an inpainting UNet
        out = latents.new_zeros(len(latents), channels, *latents.shape[2:])
        if inputs.outside is not None:
            out += inputs.outside * whole(**call)[0]
        parts = [self._part(tile, i, inputs, call, latents) for i, tile in enumerate(tiles)]
        shares = list(inputs.shares)
        if inputs.border is not None:
            shares = self._by_silhouette(plan, inputs.border, parts, inputs)
        for tile, part, share in zip(tiles, parts, shares, strict=True):
            top, bottom, left, right = tile.window.box
            out[..., top:bottom, left:right] += share[..., top:bottom, left:right] * part
        return out

    def _part(
        self, tile: Tile, number: int, inputs: TileInputs, call: Mapping[str, Any], latents: torch.Tensor
    ) -> torch.Tensor:
        """The UNet's prediction for one tile, [B, C, h, w]."""
        top, bottom, left, right = tile.window.box
        changed: dict[str, Any] = {
            "sample": latents[..., top:bottom, left:right].contiguous(),
            "encoder_hidden_states": inputs.texts[number],
        }
        if inputs.added:
            changed["added_cond_kwargs"] = {**call["added_cond_kwargs"], **inputs.added[number]}
        with self.alone(tile.names):
            return self.call.pipe.unet(**{**call, **changed})[0]

    def _by_silhouette(
        self, plan: Plan, border: torch.Tensor, parts: Sequence[torch.Tensor], inputs: TileInputs
    ) -> list[torch.Tensor]:
        """How much two tiles count, [B, 1, H, W] each: at their border, the silhouette of the thing in front decides."""
        groups, shares = inputs.groups, list(inputs.shares)
        if set(groups) != {True, False}:
            return shares  # without guidance, nothing tells a thing from what is around it
        rows = parts[plan.front].chunk(len(groups))
        outline = silhouette(rows[groups.index(True)] - rows[groups.index(False)])
        if self._in_front is not None and self._in_front.shape == outline.shape:
            outline = STEADY * self._in_front + (1 - STEADY) * outline
        self._in_front = outline
        top, bottom, left, right = plan.tiles[plan.front].window.box
        height, width = shares[0].shape
        inside = F.pad(outline, (left, width - right, top, height - bottom)).to(shares[0])  # [P, H, W]
        inside = inside.repeat(len(groups), 1, 1)[:, None]  # [B, 1, H, W]
        shares[plan.front] = torch.where(border, inside, shares[plan.front])
        shares[1 - plan.front] = torch.where(border, 1 - inside, shares[1 - plan.front])
        return shares

    def _inputs_of(
        self,
        tiles: Sequence[Tile],
        border: torch.Tensor | None,
        text: torch.Tensor,
        latents: torch.Tensor,
        added: Mapping[str, Any] | None,
    ) -> TileInputs:
        groups = groups_of(self.call.pipe, text, latents) or (True,)
        prompted = torch.tensor(groups, device=text.device).repeat_interleave(len(text) // len(groups))  # [B]
        texts = [torch.where(prompted[:, None, None], tile.text.to(text), text) for tile in tiles]
        masks = torch.stack([tile.window.mask for tile in tiles])  # [K, H, W]
        outside = (1 - masks.sum(0)).clamp_min(0)
        if border is not None and False in groups:  # silhouettes share all of it
            outside, border = outside.masked_fill(border, 0), onto(border, latents.device)
        shares = (masks / masks.sum(0).clamp_min(1)).to(latents)
        for_sdxl = added is not None and all(tile.pooled is not None for tile in tiles)
        known = [self._added(tile, prompted, latents, added) for tile in tiles if added is not None and for_sdxl]
        return TileInputs(texts, known, shares, outside.to(latents) if outside.any() else None, border, groups)

    def _added(
        self, tile: Tile, prompted: torch.Tensor, latents: torch.Tensor, whole: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """What SDXL reads besides the text: the pooled states, and size, crop and target size of the whole picture."""
        assert tile.pooled is not None
        side, (top, _, left, _), (height, width) = self.call.pipe.vae_scale_factor, tile.window.box, latents.shape[2:]
        size = torch.tensor((side * height, side * width, side * top, side * left, side * height, side * width))
        pooled = torch.where(prompted[:, None], tile.pooled.to(whole["text_embeds"]), whole["text_embeds"])
        times = whole["time_ids"]
        return {"text_embeds": pooled, "time_ids": onto(size, latents.device).to(times.dtype).expand_as(times)}


def _position(timestep: Any, times: torch.Tensor) -> int | None:
    """Where a timestep lies in a schedule that it was taken from, without asking its device; None if it was not."""
    if not isinstance(timestep, torch.Tensor) or timestep.numel() != 1 or not times.is_contiguous():
        return None
    if timestep.dtype != times.dtype or timestep.untyped_storage().data_ptr() != times.untyped_storage().data_ptr():
        return None
    position = int(timestep.storage_offset() - times.storage_offset())
    return position if 0 <= position < len(times) else None
