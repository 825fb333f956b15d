"""Several subjects in one picture: a layout of the whole, then each subject in its own tile, then the whole again.

The first steps decide horizon, light and places, so that there is one scene. In the steps that decide what a subject is, the
model only has to draw one at a time. The last steps join the parts.

The steps in tiles are Mixture of Diffusers (Jimenez 2023, arXiv 2302.02412) with separate LoRAs for each region, and without
overlap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from mole_diffusers.binding.config import Bound
from mole_diffusers.binding.picture_warning import PictureWarning
from mole_diffusers.binding.who_acts import Explanation, roles
from mole_diffusers.functional import onto
from mole_diffusers.gates.unchanged import LastTensor
from mole_diffusers.patching.host.denoiser_inputs import OF_WHOLE_SIZE, DenoiserInputs, prompted_rows
from mole_diffusers.patching.subjects.things import Alone, PictureCall, PromptThings, SetPlaces, Tiling
from mole_diffusers.patching.undo import replaced_forward

# Arguments of calls that only ask for pictures of a prompt. Tiles do not support anything else, such as an input image.
OF_A_PROMPT = {
    "prompt", "negative_prompt", "negative_prompt_2", "negative_prompt_embeds", "negative_pooled_prompt_embeds", "height",
    "width", "num_inference_steps", "guidance_scale", "guidance_rescale", "num_images_per_prompt", "eta", "generator",
    "latents", "output_type", "return_dict", "clip_skip", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    "cross_attention_kwargs",
}  # fmt: skip
OF_STATES = {"prompt_embeds", "pooled_prompt_embeds"}  # the same for a call with the text states of a known prompt
# What SDXL is told besides the prompt. Each tile is told its own part of the prompt, and its place in the picture.
OF_WHOLE_PICTURE = {"prompt_2"} | {
    f"{of}{name}" for of in ("", "negative_") for name in ("original_size", "crops_coords_top_left", "target_size")
}
SCALE_ONLY = "in cross_attention_kwargs, tiles only know the scale of LoRAs, not {!r}"
SIZES = 6  # numbers that SDXL's UNet is told of them; its refiner reads others


@dataclass(frozen=True)
class Tile:
    """A part of the picture with its own prompt."""

    names: tuple[str, ...]  # the experts that draw it
    text: torch.Tensor  # its prompt's states, [1, S, C]
    pooled: torch.Tensor | None  # [1, P], the pooled states that SDXL reads; None for other models
    mask: torch.Tensor  # [H, W] in 0..1, its place in the latents
    box: tuple[int, int, int, int]  # (top, bottom, left, right): the part of the latents that is drawn for it


@dataclass(frozen=True)
class TileInputs:
    """What tiles read, and how much they count, in all steps of a text, on its device."""

    texts: Sequence[torch.Tensor]  # [B, S, C] each: its own in the rows that are prompts, and the call's in the others
    added: Sequence[Mapping[str, torch.Tensor]]  # what SDXL reads besides, for each tile; none for other models
    shares: torch.Tensor  # [K, H, W], how much each tile counts at a place
    outside: torch.Tensor | None  # [H, W], how much the picture as a whole does; None if it counts nowhere


def draws_in_tiles(pipe: Any, call: Mapping[str, Any], bound: Mapping[str, Bound], acting: Collection[str]) -> bool:
    """Whether a bound mixture draws the pictures of a call in tiles by itself. The call includes their size."""
    read = PictureCall(pipe, Tiling(), call, bound, acting)
    things = things_for_tiles(read)
    return things is not None and not read.for_processors and _has_room(pipe.unet, _masks(read, things))


def explain(
    pipe: Any, tiling: Tiling, call: Mapping[str, Any], bound: Mapping[str, Bound], acting: Collection[str]
) -> Explanation:
    """Who acts on the prompt of a call, where and why, and the prompts of its tiles. See `Mixture.explain`."""
    read, things = PictureCall(pipe, tiling, call, bound, acting), PromptThings(call["prompt"], bound, acting)
    found = roles(list(bound), things.bound, [name in acting for name in bound], things.sentence)
    why = _why_no_tiles(read)
    tiles = None if why else [part.text for part in things.parts]
    return Explanation(found, tiles, why, things.sentence.contacts)


def _why_no_tiles(call: PictureCall) -> str:
    """Why the picture of a call is drawn as one; "" if it is drawn in tiles. Without a size, as if there were room."""
    things = call.things
    if call.tiling.until == 0:
        return "tiles are off"
    if things is None or things.sentence.why_no_tiles:
        return call.obstacle if things is None else things.sentence.why_no_tiles
    if call.given.get("width") is None or call.obstacle:
        return call.obstacle if call.given.get("width") is not None else ""
    if _has_room(call.pipe.unet, _masks(call, things)):
        return ""
    return f"{call.given['width']} x {call.given['height']} pixels are too small to draw each thing apart"


def size_for_tiles(
    pipe: Any, call: Mapping[str, Any], bound: Mapping[str, Bound], acting: Collection[str], most: int
) -> tuple[int, int] | None:
    """The smallest width and height in pixels at which `draws_in_tiles`, in whole pictures of the size that the UNet was
    trained at; None if there is none with sides of at most `most` pixels."""
    read = PictureCall(pipe, Tiling(), call, bound, acting)
    things = things_for_tiles(read)
    if things is None or read.for_processors or not isinstance(side := pipe.unet.config.sample_size, int):
        return None
    times = range(1, min(len(things.parts), most // (side * pipe.vae_scale_factor)) + 1)
    for width, height in sorted(product(times, times), key=lambda size: (size[0] * size[1], max(size), size[1])):
        if _has_room(pipe.unet, things.masks(height * side, width * side)):
            return width * side * pipe.vae_scale_factor, height * side * pipe.vae_scale_factor
    return None


def things_for_tiles(call: PictureCall) -> PromptThings | None:
    """The things that a call is drawn of, in tiles if there is room; None if its picture is drawn as one.

    Raises ValueError if tiles are always wanted and not possible, see `Mixture.tiled`.
    """
    things, always, reason = call.things, call.tiling.always, call.obstacle
    if reason and always:
        raise ValueError(reason)
    if reason or things is None or len(things.parts) < 2:
        return None
    given = {name for name, value in call.given.items() if value is not None}
    if always and (lost := sorted(given & OF_WHOLE_PICTURE)):
        raise ValueError(f"each tile has a prompt and a size of its own: draw without {' and '.join(lost)}")
    if always and call.for_processors:
        raise ValueError(f"{SCALE_ONLY.format(call.for_processors[0])}: draw without it, or without tiles")
    allowed = OF_A_PROMPT | OF_STATES if call.gives_states else OF_A_PROMPT
    return things if always or (not things.sentence.why_no_tiles and given <= allowed) else None


def _masks(call: PictureCall, things: PromptThings) -> torch.Tensor:
    """[K, H, W]: the places of a call's things in its latents."""
    height, width = (call.given[side] // call.pipe.vae_scale_factor for side in ("height", "width"))
    return things.masks(height, width)


def _has_room(unet: Any, masks: torch.Tensor) -> bool:
    """Whether each place [K, H, W] is at least as large as the pictures that a UNet was trained with."""
    trained = unet.config.sample_size
    return isinstance(trained, int) and all(
        min(bottom - top, right - left) >= trained for top, bottom, left, right in map(_extent, masks)
    )


def _extent(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) around a mask [H, W]; all 0 if it is empty."""
    if not mask.any():
        return 0, 0, 0, 0
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def _box(mask: torch.Tensor, unet: Any) -> tuple[int, int, int, int]:
    """The extent of a mask [H, W], enlarged so that a UNet can halve it without a remainder."""
    step = 2 ** (len(unet.config.block_out_channels) - 1)
    top, bottom, left, right = _extent(mask)
    bottom, right = (-(-end // step) * step for end in (bottom, right))
    return top // step * step, min(bottom, mask.shape[0]), left // step * step, min(right, mask.shape[1])


class Tiles:
    """The denoiser's calls for each thing of a prompt, see `Mixture.tiled`. First, `set_places` gets their places."""

    def __init__(self, call: PictureCall, things: PromptThings, alone: Alone, set_places: SetPlaces):
        self.call, self.things, self.alone, self.set_places = call, things, alone, set_places
        self.reader = DenoiserInputs(call.pipe.unet)
        # (height, width of the latents, tokens of the text) -> tiles; none if the picture is drawn as one.
        self._found: dict[tuple[int, int, int], list[Tile]] = {}
        self._text = LastTensor()
        self._inputs: TileInputs | None = None  # for this text
        self._schedule = LastTensor()
        self._levels: list[float] = []  # of noise, for each timestep of this schedule

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """While the block runs, the UNet is called for each tile in the steps that `Tiling` says."""
        with replaced_forward(self.call.pipe.unet, partial(self._denoise, self.call.pipe.unet.forward)):
            yield

    def _denoise(self, whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The UNet's prediction; `whole` draws the picture as one."""
        if not (tiles := self._tiles(args, kwargs)) or not self._is_in_tiles(args, kwargs):
            return whole(*args, **kwargs)
        out = self._parts(tiles, whole, args, kwargs)
        return UNet2DConditionOutput(sample=out) if kwargs.get("return_dict", True) else (out,)

    def _is_in_tiles(self, args: tuple, kwargs: dict) -> bool:
        """Whether this step is drawn in tiles. The last step is not, unless `until` is 1."""
        times = self.call.pipe.scheduler.timesteps
        if not self._schedule.is_again(times):
            self._levels = (times.float() / self.reader.record.pure_noise).tolist()
        index = _position(self.reader.timestep(args, kwargs), times)
        now = float(self.reader.time(args, kwargs)[0]) if index is None else self._levels[index]
        until_here = sum(level > now - 1e-5 for level in self._levels)  # Heun's method has most of them twice
        since, until = (share * len(times) + 1e-5 for share in (self.call.tiling.since, self.call.tiling.until))
        return since < until_here <= until

    def _tiles(self, args: tuple, kwargs: dict) -> list[Tile]:
        """The tiles of a call; none if it draws the picture as one."""
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
            return []
        size = (*latents.shape[-2:], text.shape[1])
        if size not in self._found:
            self._found[size] = self._tiles_at(*size)
        return self._found[size]

    def _tiles_at(self, height: int, width: int, tokens: int) -> list[Tile]:
        things, masks = self.things, self.things.masks(height, width)
        if not self.call.tiling.always and not _has_room(self.call.pipe.unet, masks):
            return []
        if self.call.for_processors:
            why = SCALE_ONLY.format(self.call.for_processors[0])
            warnings.warn(f"{why}, so this is drawn as one picture", PictureWarning, stacklevel=2)
            return []
        for thing, mask in zip(things.sentence.things, masks, strict=False):
            if not mask.any():
                raise ValueError(f"the regions leave no place for {thing.name!r}")
        tiles: list[Tile] = []
        for i, mask in enumerate(masks):
            names = things.drawing(i)
            with torch.no_grad(), self.alone(names):
                text, pooled = self.call.encode(things.parts[i])
            if (short := text.shape[1]) != tokens:
                if self.call.tiling.always:
                    raise ValueError(f"tiles read prompts of {short} tokens, and this one has {tokens}: shorten it")
                return []
            tiles.append(Tile(names, text, pooled, mask, _box(mask, self.call.pipe.unet)))
        if self.set_places(dict(zip(things.keys, masks, strict=False))):
            return tiles
        if self.call.tiling.always:
            named = " and ".join(repr(thing.name) for thing in things.sentence.things[: len(masks)])
            raise ValueError(f"the text encoder reads other things in this prompt than {named}: shorten or reword it")
        return []

    def _parts(self, tiles: Sequence[Tile], whole: Callable[..., Any], args: tuple, kwargs: dict) -> torch.Tensor:
        """The UNet's prediction, tile by tile. Outside of all tiles it is that of `whole`, where words of things are
        closed.
        """
        latents, text = self.reader.latents(args, kwargs), self.reader.text(args, kwargs)
        if not self._text.is_again(text) or self._inputs is None or self._inputs.shares.shape[1:] != latents.shape[2:]:
            self._inputs = self._inputs_of(tiles, text, latents, kwargs.get("added_cond_kwargs"))
        inputs = self._inputs
        call = dict(zip(self.reader.names, args, strict=False)) | kwargs | {"return_dict": False}
        channels = self.call.pipe.unet.config.out_channels  # fewer than the inputs of an inpainting UNet
        out = latents.new_zeros(len(latents), channels, *latents.shape[2:])
        if inputs.outside is not None:
            out += inputs.outside * whole(**call)[0]
        for i, (tile, own, share) in enumerate(zip(tiles, inputs.texts, inputs.shares, strict=True)):
            top, bottom, left, right = tile.box
            changed: dict[str, Any] = {
                "sample": latents[..., top:bottom, left:right].contiguous(),
                "encoder_hidden_states": own,
            }
            if inputs.added:
                changed["added_cond_kwargs"] = {**kwargs["added_cond_kwargs"], **inputs.added[i]}
            with self.alone(tile.names):
                part = self.call.pipe.unet(**call | changed)[0]
            out[..., top:bottom, left:right] += share[top:bottom, left:right] * part
        return out

    def _inputs_of(
        self, tiles: Sequence[Tile], text: torch.Tensor, latents: torch.Tensor, added: Mapping[str, Any] | None
    ) -> TileInputs:
        prompted = prompted_rows(self.call.pipe, text, latents)
        texts = [torch.where(prompted[:, None, None], tile.text.to(text), text) for tile in tiles]
        masks = torch.stack([tile.mask for tile in tiles])  # [K, H, W]
        outside = (1 - masks.sum(0)).clamp_min(0)
        shares = (masks / masks.sum(0).clamp_min(1)).to(latents)
        for_sdxl = added is not None and all(tile.pooled is not None for tile in tiles)
        known = [self._added(tile, prompted, latents, added) for tile in tiles if added is not None and for_sdxl]
        return TileInputs(texts, known, shares, outside.to(latents) if outside.any() else None)

    def _added(
        self, tile: Tile, prompted: torch.Tensor, latents: torch.Tensor, whole: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """What SDXL reads besides the text: the pooled states, and size, crop and target size of the whole picture."""
        assert tile.pooled is not None
        side, (top, _, left, _), (height, width) = self.call.pipe.vae_scale_factor, tile.box, latents.shape[2:]
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
