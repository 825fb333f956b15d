"""Several subjects in one picture, each drawn in a tile of its own at first: what a model that draws one of them can do.

Mixture of Diffusers (Jimenez 2023, arXiv 2302.02412) with LoRAs of its own for each region, and without overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mole_diffusers.binding.config import Bound, given_region
from mole_diffusers.binding.layout import MOST_THINGS, partition, planned
from mole_diffusers.binding.regions import EVERYWHERE, region_mask
from mole_diffusers.binding.words import ThingKey, prompts_apart
from mole_diffusers.patching.denoiser_inputs import DenoiserInputs, compiled_from, prompted_rows
from mole_diffusers.patching.undo import replaced_forward

UNTIL = 0.8  # share of the steps
OF_WHOLE_SIZE = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
# Arguments of a call that ask for more than a picture of the prompt: tiles know nothing of an image that is drawn over.
BESIDE_THE_PROMPT = ("image", "ip_adapter_image", "ip_adapter_image_embeds", "cross_attention_kwargs", "prompt_2")
OF_PIPELINES = ("encode_prompt", "do_classifier_free_guidance")

By = Callable[[Sequence[str]], AbstractContextManager[None]]  # only these experts, on every word


@dataclass(frozen=True)
class Tiling:
    """Whether pictures are drawn in tiles at first.

    Attributes:
        until: share of the steps in 0..1, from pure noise; 0 for none.
        always: whatever the size and the prompt, and with a ValueError where that cannot be. Otherwise where a call asks for
            a picture of nothing but its prompt, that lists things of two experts or more, side by side, and each has room
            for a picture of the size that the model was trained at.
        prompt: the text of pictures whose call has none, but its states.
    """

    until: float = UNTIL
    always: bool = False
    prompt: str | None = None


@dataclass(frozen=True)
class Tile:
    """A part of the picture with a prompt of its own.

    Attributes:
        names: the experts that draw it.
        text: its prompt's states, [1, S, C].
        pooled: [1, P], what SDXL reads of the prompt as a whole; None elsewhere.
        mask: [H, W] in 0..1, its place in the latents.
        box: (top, bottom, left, right): what is drawn for it, in the latents.
    """

    names: tuple[str, ...]
    text: torch.Tensor
    pooled: torch.Tensor | None
    mask: torch.Tensor
    box: tuple[int, int, int, int]

    @property
    def height(self) -> int:
        """Of its box."""
        return self.box[1] - self.box[0]

    @property
    def width(self) -> int:
        """Of its box."""
        return self.box[3] - self.box[2]


def tiles_for(
    pipe: Any,
    tiling: Tiling,
    call: Mapping[str, Any],
    *,
    bound: Mapping[str, Bound],
    acting: Collection[str],
    by: By,
    settle: Callable[[Mapping[ThingKey, torch.Tensor]], None],
) -> Tiles | None:
    """What draws the pictures of a call in tiles; None where they are drawn as one.

    Args:
        call: its arguments.
        bound: each expert's words and region.
        acting: the experts that are on.
        by: a context in which only some of them act, on every word.
        settle: is told the place [H, W] of each thing, by `Thing.key`, before the first tile is drawn.

    Raises ValueError where tiles are always wanted and cannot be: another kind of pipeline, no one prompt, more than eight
    things; and when a picture is drawn, a ControlNet, a prompt of several chunks, or regions that leave a thing no place.
    """
    prompt = tiling.prompt or _one_prompt(call.get("prompt"))
    things = None if prompt is None else Things(prompt, bound, acting)
    reason = _obstacle(pipe, things)
    if reason and tiling.always:
        raise ValueError(reason)
    if reason or things is None or len(things.prompts) < 2:
        return None
    if not tiling.always and not (things.are_listed and all(call.get(name) is None for name in BESIDE_THE_PROMPT)):
        return None
    return Tiles(pipe, tiling, things, call.get("clip_skip"), by=by, settle=settle)


def draws_in_tiles(
    pipe: Any, prompt: str, size: tuple[int, int], bound: Mapping[str, Bound], acting: Collection[str]
) -> bool:
    """Whether a bound mixture draws a prompt in tiles by itself, at `size`, width and height in pixels."""
    things = Things(prompt, bound, acting)
    if _obstacle(pipe, things) or not things.are_listed:
        return False
    width, height = (side // pipe.vae_scale_factor for side in size)
    return _has_room(pipe.unet, things.masks(height, width))


def _obstacle(pipe: Any, things: Things | None) -> str:
    """Why a pipeline cannot draw these in tiles; "" where it can."""
    if getattr(pipe, "unet", None) is None or not all(hasattr(type(pipe), name) for name in OF_PIPELINES):
        return f"tiles need a unet, and {' and '.join(OF_PIPELINES)} of the pipeline, unlike {type(pipe).__name__}"
    if compiled_from(pipe.unet) is not pipe.unet:
        return "tiles have other sizes than the picture, and the unet is compiled as one graph"
    if things is None:
        return "tiles are drawn of one prompt: call the pipeline with it, or say tiled(prompt=...)"
    count = len(things.prompts)
    return f"{MOST_THINGS} things can have tiles of their own, and the prompt names {count}" if count > MOST_THINGS else ""


def _one_prompt(given: Any) -> str | None:
    texts = {given} if isinstance(given, str) else set(given) if isinstance(given, list | tuple) else set()
    return texts.pop() if len(texts) == 1 else None


def _has_room(unet: Any, masks: torch.Tensor) -> bool:
    """Whether each place [K, H, W] is at least as large as the pictures that a UNet was trained with."""
    trained = unet.config.sample_size
    return isinstance(trained, int) and all(
        min(below - top, right - left) >= trained for top, below, left, right in (_box(mask, unet) for mask in masks)
    )


def _box(mask: torch.Tensor, unet: Any) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of what is around a mask [H, W], as large as a UNet can halve without a rest."""
    if not mask.any():
        return 0, 0, 0, 0
    step = 2 ** (len(unet.config.block_out_channels) - 1)
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    top, left = rows[0] // step * step, columns[0] // step * step
    bottom, right = (-(-(last[-1] + 1) // step) * step for last in (rows, columns))
    return top, min(bottom, mask.shape[0]), left, min(right, mask.shape[1])


class Things:
    """What a prompt names, one by one.

    Attributes:
        prompts: index of a thing in the reading, in the order of naming -> the prompt of it alone.
        everywhere: the experts that act in the whole picture, as a style does.
        are_listed: whether things of two experts or more are named, side by side.
    """

    def __init__(self, prompt: str, bound: Mapping[str, Bound], acting: Collection[str]):
        self.names, self.bound, self.acting = list(bound), list(bound.values()), acting
        whole = [k for k, b in enumerate(self.bound) if b.region == EVERYWHERE]
        self.reading, self.prompts, side_by_side = prompts_apart(prompt, [b.words for b in self.bound], whole)
        placed = {k for i in self.prompts for k in self.reading.things[i].experts}
        self.everywhere = tuple(
            name
            for k, (name, own) in enumerate(bound.items())
            if name in acting and k not in placed and (self.reading.said[k] or not own.needs_words)
        )
        self.are_listed = side_by_side and sum(bool(self.experts(i)) for i in self.prompts) > 1

    def experts(self, thing: int) -> tuple[str, ...]:
        """The experts of a thing that are on."""
        return tuple(name for k in self.reading.things[thing].experts if (name := self.names[k]) in self.acting)

    def masks(self, height: int, width: int) -> torch.Tensor:
        """[K, height, width] in 0..1: the place of each, as given, or a cell of what is left, in the order of naming."""
        reading, given = self.reading, {}
        for i in self.prompts:
            if (region := given_region(reading.things[i], self.bound)) is not None:
                given[i] = region_mask(region, height, width)
        free, masks = [i for i in self.prompts if i not in given], dict(given)
        if free:
            relations = [(free.index(a), free.index(b), axis) for a, b, axis in reading.relations if a in free and b in free]
            first = partition(len(free), height, width, [axis for _, _, axis in relations])[: len(free)]
            places, _ = planned(first, height, width, relations, taken=list(given.values()))
            masks |= dict(zip(free, places, strict=True))
        return torch.stack([masks[i] for i in self.prompts])


class Tiles:
    """The denoiser's calls for each thing of a prompt.

    In the first steps the denoiser is called for each thing on its part of the latents alone, with the prompt without the
    other things, and with its own expert and those that act everywhere. The last steps draw the picture as one, bound to
    these places, which joins the parts.
    """

    def __init__(
        self,
        pipe: Any,
        tiling: Tiling,
        things: Things,
        clip_skip: int | None,
        *,
        by: By,
        settle: Callable[[Mapping[ThingKey, torch.Tensor]], None],
    ):
        self.pipe, self.tiling, self.things, self.clip_skip = pipe, tiling, things, clip_skip
        self.by, self.settle = by, settle
        self.reader = DenoiserInputs(pipe.unet)
        self._found: dict[torch.Size, list[Tile]] = {}  # of latents of this size; none where they are drawn as one

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """While the block runs, the UNet is called for each tile in the first steps."""
        with replaced_forward(self.pipe.unet, self._denoise):
            yield

    def _denoise(self, *args: Any, **kwargs: Any) -> Any:
        now = self.reader.time(args, kwargs)[0].cpu()
        noisier = self.pipe.scheduler.timesteps.float().cpu() / self.reader.pure_noise > now + 1e-5
        if noisier.float().mean() >= self.tiling.until or not (tiles := self._tiles(args, kwargs)):
            return self.pipe.unet(*args, **kwargs)
        return self._parts(tiles, args, kwargs)

    def _tiles(self, args: tuple, kwargs: dict) -> list[Tile]:
        """The tiles of a call; none where it draws the picture as one."""
        side = self.reader.latents(args, kwargs).shape[-2:]
        if any(kwargs.get(name) is not None for name in OF_WHOLE_SIZE):
            if self.tiling.always:
                raise ValueError("a ControlNet sees the whole picture, and tiles are parts of it: draw without one of them")
            return []
        if side not in self._found:
            self._found[side] = self._planned(*side)
        return self._found[side]

    def _planned(self, height: int, width: int) -> list[Tile]:
        things, masks = self.things, self.things.masks(height, width)
        if not self.tiling.always and not _has_room(self.pipe.unet, masks):
            return []
        for i, mask in zip(things.prompts, masks, strict=True):
            if not mask.any():
                raise ValueError(f"the regions leave no place for {things.reading.things[i].name!r}")
        self.settle({things.reading.things[i].key: mask for i, mask in zip(things.prompts, masks, strict=True)})
        return [self._tile(*each, mask) for each, mask in zip(things.prompts.items(), masks, strict=True)]

    def _tile(self, thing: int, prompt: str, mask: torch.Tensor) -> Tile:
        names = self.things.experts(thing) + self.things.everywhere
        with torch.no_grad(), self.by(names):
            made = self.pipe.encode_prompt(
                prompt=prompt,
                device=self.pipe._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                **({} if self.clip_skip is None else {"clip_skip": self.clip_skip}),
            )
        return Tile(names, made[0], made[2] if len(made) == 4 else None, mask, _box(mask, self.pipe.unet))

    def _parts(self, tiles: Sequence[Tile], args: tuple, kwargs: dict) -> tuple[torch.Tensor]:
        """What the UNet predicts, tile by tile; where none is, the picture as a whole without the experts of the tiles."""
        latents, text = self.reader.latents(args, kwargs), self.reader.text(args, kwargs)
        prompted = prompted_rows(self.pipe, text, latents)
        if (long := text.shape[1]) != (short := tiles[0].text.shape[1]):
            raise ValueError(f"tiles read prompts of {short} tokens, and this one has {long}: shorten it")

        def predict(names: Sequence[str], **changed: Any) -> torch.Tensor:
            changed = {**kwargs, **changed, "return_dict": False}
            rest = {name: value for name, value in zip(self.reader.names, args, strict=False) if name not in changed}
            with self.by(names):
                return self.pipe.unet(**rest, **changed)[0]

        masks = torch.stack([tile.mask for tile in tiles]).to(latents)  # [K, H, W]
        shares, outside = masks / masks.sum(0).clamp_min(1), (1 - masks.sum(0)).clamp_min(0)
        channels = self.pipe.unet.config.out_channels  # fewer than go in, where it is a UNet for inpainting
        out = latents.new_zeros(len(latents), channels, *latents.shape[2:])
        if outside.any():
            out += outside * predict(self.things.everywhere, sample=latents, encoder_hidden_states=text)
        for tile, share in zip(tiles, shares, strict=True):
            top, bottom, left, right = tile.box
            part = predict(
                tile.names,
                sample=latents[..., top:bottom, left:right].contiguous(),
                encoder_hidden_states=torch.where(prompted[:, None, None], tile.text.to(text), text),
                **self._pooled(tile, prompted, kwargs.get("added_cond_kwargs")),
            )
            out[..., top:bottom, left:right] += share[top:bottom, left:right] * part
        return (out,)

    def _pooled(self, tile: Tile, prompted: torch.Tensor, whole: Mapping[str, Any] | None) -> dict[str, Any]:
        """What SDXL reads beside the text: the pooled states, and the sizes of a picture that is the tile."""
        if tile.pooled is None or whole is None:
            return {}
        side = self.pipe.vae_scale_factor
        size = (side * tile.height, side * tile.width)
        times = whole["time_ids"]
        own = torch.tensor((*size, 0, 0, *size)).to(times)
        pooled = torch.where(prompted[:, None], tile.pooled.to(whole["text_embeds"]), whole["text_embeds"])
        return {"added_cond_kwargs": {**whole, "text_embeds": pooled, "time_ids": own.expand_as(times)}}
