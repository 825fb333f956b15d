"""Several subjects in one picture, each drawn in a tile of its own at first: what a model that draws one of them can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mole_diffusers.binding.config import Bound, files_bindings
from mole_diffusers.binding.layout import partition, planned
from mole_diffusers.binding.regions import AUTO, EVERYWHERE, region_mask
from mole_diffusers.binding.words import Reading, prompts_apart
from mole_diffusers.mixture import Mixture, attached
from mole_diffusers.patching.denoiser_inputs import DenoiserInputs, denoiser, groups_of
from mole_diffusers.patching.undo import replaced_forward

UNTIL = 0.8  # share of the steps
MOST = 8  # things with a tile of their own
OF_WHOLE_SIZE = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")


@dataclass(frozen=True)
class Tile:
    """A part of the picture with a prompt of its own.

    Attributes:
        names: the experts that draw it.
        text: its prompt's states, [1, S, C].
        mask: [H, W] in 0..1, its place in the latents.
        box: (top, bottom, left, right): what is drawn for it, in the latents.
    """

    names: tuple[str, ...]
    text: torch.Tensor
    mask: torch.Tensor
    box: tuple[int, int, int, int]


@contextmanager
def tiled(pipe: Any, prompt: str, *, until: float = UNTIL) -> Iterator[None]:
    """Draw pictures of `prompt` in tiles at first: each thing that it names as a picture of its own, in its own place.

    In the first steps the denoiser is called for each thing on its part of the latents alone, with the prompt without the
    other things, and with its own expert and those that act everywhere, as a style does. The last steps draw the picture as
    one, bound as usual, which joins the parts (Mixture of Diffusers, Jimenez 2023, arXiv 2302.02412, with a LoRA for each
    region and without overlap). A tile should have about the size that the model draws best: two 512 x 512 pixels of Stable
    Diffusion 1.5 need a picture of 1024 x 512.

    Places are those that the mixture is bound to; things without one share the rest of the picture in the order of naming,
    unless words as "left of" decide. A prompt that names less than two things is drawn as usual.

    Args:
        pipe: with experts attached, a UNet and one text encoder.
        prompt: what the pipeline is called with inside the block.
        until: share of the steps in 0..1, from pure noise, that are drawn in tiles.

    Raises ValueError for another kind of pipeline, a share outside of 0..1, more than eight things, or, when a picture is
    drawn, a ControlNet, a prompt of several chunks, or regions that leave a thing no place.
    """
    mixture = attached(pipe)
    if mixture is None:
        raise ValueError("tiles are drawn by experts: attach some first")
    if getattr(pipe, "unet", None) is None or getattr(pipe, "text_encoder_2", None) is not None:
        raise ValueError(f"tiles need a unet and one text encoder, unlike {type(pipe).__name__}")
    if not 0 <= until <= 1:
        raise ValueError(f"the share of steps that are drawn in tiles is in 0..1, got {until}")
    plan = _Plan(pipe, mixture, prompt)
    if len(plan.texts) > MOST:
        raise ValueError(f"{MOST} things can have tiles of their own, and the prompt names {len(plan.texts)}")
    if len(plan.texts) < 2 or not until:
        yield
        return
    reader, drawn = DenoiserInputs(denoiser(pipe)), {}

    def denoise(*args: Any, **kwargs: Any) -> Any:
        noisier = pipe.scheduler.timesteps.float().cpu() / reader.pure_noise > reader.time(args, kwargs)[0].cpu() + 1e-5
        if noisier.float().mean() >= until:  # so many of the steps are behind
            return pipe.unet(*args, **kwargs)
        if any(kwargs.get(name) is not None for name in OF_WHOLE_SIZE):
            raise ValueError("a ControlNet sees the whole picture, and tiles are parts of it: draw without one of them")
        side = reader.latents(args, kwargs).shape[-2:]
        if side not in drawn:
            drawn[side] = plan.tiles(*side)
        return _denoised(pipe, mixture, drawn[side], plan.everywhere, reader, args, kwargs)

    with replaced_forward(pipe.unet, denoise):
        yield


class _Plan:
    """What a prompt asks for, part by part.

    Attributes:
        everywhere: the experts that act in every tile.
        texts: of each tile, (experts, states [1, S, C]).
    """

    def __init__(self, pipe: Any, mixture: Mixture, prompt: str):
        self.pipe = pipe
        bound = mixture.binding or files_bindings(mixture.experts)
        self.bound, names = list(bound.values()), list(bound)
        whole = [k for k, b in enumerate(self.bound) if b.region == EVERYWHERE]
        self.reading, prompts = prompts_apart(prompt, [b.words for b in self.bound], whole)
        self.things = list(prompts)
        placed = {k for i in prompts for k in self.reading.things[i].experts}
        self.everywhere = tuple(n for k, n in enumerate(names) if n in mixture.active and self._acts(k) and k not in placed)
        self.texts = []
        for i, text in prompts.items():
            own = tuple(names[k] for k in self.reading.things[i].experts if names[k] in mixture.active) + self.everywhere
            with torch.no_grad(), mixture.bound(None), mixture.only(*own):
                self.texts.append((own, pipe.encode_prompt(text, pipe._execution_device, 1, False)[0]))

    def _acts(self, k: int) -> bool:
        bound = self.bound[k]
        return self.reading.said[k] or not bound.words or not bound.required

    def tiles(self, height: int, width: int) -> list[Tile]:
        """The tiles of latents of this size."""
        masks = _masks(self.reading, self.things, self.bound, height, width)
        step = 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)  # what the UNet halves without a rest
        found = []
        for (names, text), mask in zip(self.texts, masks, strict=True):
            if not mask.any():
                raise ValueError(f"the regions leave no place for {names[0]!r}" if names else "the regions leave no place")
            rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
            top, left = rows[0] // step * step, columns[0] // step * step
            bottom, right = (-(-(last[-1] + 1) // step) * step for last in (rows, columns))
            found.append(Tile(names, text, mask, (top, min(bottom, height), left, min(right, width))))
        return found


def _masks(reading: Reading, things: Sequence[int], bound: Sequence[Bound], height: int, width: int) -> torch.Tensor:
    """[K, height, width] in 0..1: the place of each thing, as given, or a cell of what is left, in the order of naming."""
    given = {}
    for i in things:
        regions = [bound[k].region for k in reading.things[i].experts]
        if (region := next((r for r in regions if r not in (AUTO, EVERYWHERE)), None)) is not None:
            given[i] = region_mask(region, height, width)
    free = [i for i in things if i not in given]
    masks = dict(given)
    if free:
        relations = [(free.index(a), free.index(b), axis) for a, b, axis in reading.relations if a in free and b in free]
        first = partition(len(free), height, width, [axis for _, _, axis in relations])[: len(free)]
        left = 1 - torch.stack(list(given.values())).amax(0) if given else None
        masks |= dict(zip(free, planned(first, height, width, relations, free=left)[0], strict=True))
    return torch.stack([masks[i] for i in things])


def _denoised(
    pipe: Any,
    mixture: Mixture,
    found: Sequence[Tile],
    everywhere: Sequence[str],
    reader: DenoiserInputs,
    args: tuple,
    kwargs: dict,
) -> tuple[torch.Tensor]:
    """What the UNet predicts, tile by tile; where none is, the picture as a whole without the experts of the tiles."""
    latents, text = reader.latents(args, kwargs), reader.text(args, kwargs)
    groups = groups_of(pipe, text, latents) or (True,)
    prompted = torch.tensor(groups, device=text.device).repeat_interleave(len(text) // len(groups))[:, None, None]

    def predict(names: Sequence[str], sample: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        changed = {**kwargs, "sample": sample, "encoder_hidden_states": states, "return_dict": False}
        rest = {name: value for name, value in zip(reader.names, args, strict=False) if name not in changed}
        with mixture.bound(None), mixture.only(*names):
            return pipe.unet(**rest, **changed)[0]

    if (long := text.shape[1]) != (short := found[0].text.shape[1]):
        raise ValueError(f"tiles read prompts of {short} tokens, and this one has {long}: shorten it")
    masks = torch.stack([tile.mask for tile in found]).to(latents)  # [K, H, W]
    shares, outside = masks / masks.sum(0).clamp_min(1), (1 - masks.sum(0)).clamp_min(0)
    channels = pipe.unet.config.out_channels  # fewer than go in, where it is a UNet for inpainting
    out = latents.new_zeros(len(latents), channels, *latents.shape[2:])
    if outside.any():
        out += outside * predict(everywhere, latents, text)
    for tile, share in zip(found, shares, strict=True):
        top, bottom, left, right = tile.box
        states = torch.where(prompted, tile.text.to(text), text)
        part = predict(tile.names, latents[..., top:bottom, left:right].contiguous(), states)
        out[..., top:bottom, left:right] += share[top:bottom, left:right] * part
    return (out,)
