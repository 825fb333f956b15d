"""Regional composers: each LoRA has its own prompt and part of the picture, in the attention or in the predictions.

They are contexts on a mixture without binding. Experts without a part, such as a style, act everywhere and on every text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mole_diffusers import Mixture
from mole_diffusers.binding import AUTO, EVERYWHERE, Bound, GridSize, Region, region_mask
from mole_diffusers.training import token_ids
from rivals.sampling_composers import read_by, texts_apart
from rivals.unet_calls import StepCounter, grid_of, prompted_rows, replaced_forward, sampling_steps

RegionalPrompt = tuple[str, Region]  # a prompt for one concept alone, and where in the picture it is

THRESHOLD = 0.3  # CLoRA: a concept is where its words get more than this share of their highest attention


@contextmanager
def regional_prompts(pipe: Any, mixture: Mixture, prompt: str, parts: Mapping[str, RegionalPrompt]) -> Iterator[None]:
    """Regional LoRA of kohya's sd-scripts (`LoRAInfModule` of networks/lora.py): a prompt and a LoRA for each region.

    In layers of the picture y = W x + sum_k M_k B_k A_k x. In cross-attention, the places of region k read prompt k.
    Only LoRA k encodes this prompt and makes its keys and values: out = sum_k M_k attention_k. If regions overlap, M_k /
    sum_j M_j replaces M_k. The unconditional text is read without LoRAs.

    There are two differences. Places outside all regions read `prompt`, without the LoRAs that have a part; the authors'
    code gives them no text. The cross-attention of unconditional rows has no LoRA at all; theirs keeps that of the
    queries.

    Args:
        mixture: with a gate per matrix, so that LoRAs can change within a block.
        prompt: what you call the pipeline with. Any other text counts as unconditional.
        parts: expert -> (its prompt, its region), in any order.

    Raises ValueError for other gates, a region "auto", no part, or an unknown expert.
    """
    if (config := mixture.config.to_dict()).get("granularity") != "matrix":
        raise ValueError(f"regional prompts need a gate per matrix (granularity), got {config}")
    if lost := [name for name, (_, region) in parts.items() if region == AUTO]:
        raise ValueError(f"regional prompts need a region for each part, and there is none for {lost}")
    names, regions = _names_by_text(mixture, parts), [region for _, region in parts.values()]
    whole = {name: Bound((), parts[name][1] if name in parts else EVERYWHERE) for name in mixture.experts}
    now: dict[str, Any] = {}  # of the UNet's call: its texts, the shares of the regions, and which rows are prompted

    def run(unet: nn.Module, texts: Sequence[torch.Tensor], args: tuple, kwargs: dict) -> Any:
        shares = _shares(torch.stack([place_mask(region, args[0].shape[-2:]) for region in regions])).to(args[0])
        now.update(texts=texts, shares=shares, prompted=prompted_rows(pipe, args[0])[:, None, None])
        return unet(*args, **{**kwargs, "encoder_hidden_states": texts[-1]})

    def attend(module: nn.Module, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """One cross-attention, [B, T, C] -> [B, T, C]: regions read their own texts, the rest of the picture the last
        one.
        """

        def read(names: Sequence[str], text: torch.Tensor) -> torch.Tensor:
            with mixture.only(*names):
                return module(hidden, **{**kwargs, "encoder_hidden_states": text})

        side = grid_of(hidden.shape[1], now["shares"])
        shares = F.adaptive_avg_pool2d(now["shares"], side).flatten(1)[:, None, :, None].to(hidden.dtype)  # [K + 1, 1, T, 1]
        found = torch.stack([read(*each) for each in zip(names, now["texts"], strict=True)])
        return torch.where(now["prompted"], (shares * found).sum(0), read((), now["texts"][-1]))

    with ExitStack() as undo:
        undo.enter_context(mixture.bound(whole))
        undo.enter_context(texts_apart(pipe, _readers(pipe, mixture, prompt, parts, unprompted=()), run))
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                undo.enter_context(replaced_forward(module, partial(attend, module)))
        yield


def masked_blend(
    pipe: Any,
    mixture: Mixture,
    prompt: str,
    parts: Mapping[str, RegionalPrompt],
    *,
    since: float = 0.0,
    until: float = 1.0,
) -> AbstractContextManager[None]:
    """One prediction for each LoRA, blended by regions: e = sum_k M_k e_k + (1 - sum_k M_k) e_0.

    e_k is the prediction of LoRA k alone with its own prompt; e_0 is the prediction without them, with `prompt`. This
    takes one UNet call for each, plus one. It is the common part of MultiDiffusion (arXiv 2302.08113), CLoRA
    (2403.19776) and Concept Conductor (2408.03632). It leaves out what the last two do to the latents: CLoRA's
    contrastive loss on attention maps, and Concept Conductor's reference layout.

    A region "auto" is found anew at each step, as in CLoRA: where the concept's words get more than THRESHOLD of their
    highest attention in its own call, and more attention than those of others in theirs. A concept that is nowhere has
    no part. Maps are those of binding, with queries and keys of the base and scaled from 0 to 1 in each layer; CLoRA
    takes the LoRA's maps as they are.

    Args:
        prompt: what you call the pipeline with. Each LoRA reads any other text, such as the unconditional one, unchanged.
        parts: expert -> (its prompt, its region), in any order. In CLoRA every such prompt is `prompt`.
        since: share of the steps in 0..1 from which predictions are blended. Before, all LoRAs are summed.
        until: the share up to which they are, with the sum after it.

    Raises ValueError for no part, or an unknown expert.
    """
    models = _names_by_text(mixture, parts)
    steps = StepCounter()
    readings = [_reading(mixture, name) if region == AUTO else None for name, (_, region) in parts.items()]

    def run(unet: nn.Module, texts: Sequence[torch.Tensor], args: tuple, kwargs: dict) -> Any:
        *texts, of_all = texts
        if not since <= steps.at(args, kwargs) / sampling_steps(pipe) < until:
            return unet(*args, **{**kwargs, "encoder_hidden_states": of_all})
        found, maps = [], []
        for names, text, reading in zip(models, texts, [*readings, None], strict=True):
            with mixture.only(*names), mixture.bound(reading), mixture.trace(maps=True) as trace:
                found.append(unet(*args, **{**kwargs, "encoder_hidden_states": text, "return_dict": False})[0])
            maps.append(trace.maps.get(0, []))
        scores = torch.stack(found)  # [K + 1, rows, C, H, W]
        shares = _shares(_masks(parts, maps[:-1], args[0].shape[-2:])).to(scores)[:, :, None]  # [K + 1, B, 1, H, W]
        return ((scores * shares.repeat(1, scores.shape[1] // shares.shape[1], 1, 1, 1)).sum(0),)

    whole = partial(read_by, pipe, mixture, list(mixture.experts))
    return texts_apart(pipe, [*_readers(pipe, mixture, prompt, parts), whole], run)


def _reading(mixture: Mixture, name: str) -> dict[str, Any]:
    """A binding under which a single expert acts as if unbound, while the maps of its words are read."""
    words = mixture.file_words[name].words
    return dict.fromkeys(mixture.experts, EVERYWHERE) | {name: Bound(words, EVERYWHERE, required=False)}


def _masks(
    parts: Mapping[str, RegionalPrompt], maps: Sequence[Sequence[Mapping[str, torch.Tensor]]], side: GridSize
) -> torch.Tensor:
    """The place of each part: [K, B, H, W] in 0..1, with B = 1 if there are no maps.

    Args:
        maps: [K][B], from each part's own call: expert -> [h, w]; none if its region is given, or no word was read.
    """
    pictures, nowhere = max(map(len, maps)) or 1, torch.zeros(1, 1)
    read = [[each.get(name, nowhere) for each in own or [{}] * pictures] for name, own in zip(parts, maps, strict=True)]
    attended = torch.stack([torch.stack([F.interpolate(m[None, None], side)[0, 0] for m in own]) for own in read])
    most, highest = attended.amax((2, 3), keepdim=True), attended.amax(0)
    masks = ((attended == highest) & (attended > THRESHOLD * most)).float()
    for mask, (_, region) in zip(masks, parts.values(), strict=True):
        if region != AUTO:
            mask[:] = place_mask(region, side)
    return masks


def place_mask(region: Region, side: GridSize) -> torch.Tensor:
    """[H, W] in 0..1, of a given region."""
    return torch.ones(side) if region == EVERYWHERE else region_mask(region, *side)


def _shares(masks: torch.Tensor) -> torch.Tensor:
    """Masks [K, ...] in 0..1 as shares of each place, which sum to 1: [K + 1, ...], the last for places outside all
    masks.
    """
    total = masks.sum(0, keepdim=True)
    return torch.cat([masks / total.clamp_min(1), (1 - total).clamp_min(0)])


def _names_by_text(mixture: Mixture, parts: Mapping[str, RegionalPrompt]) -> list[list[str]]:
    """The experts of each part's text, and those of the whole prompt."""
    if not parts or any(name not in mixture.experts for name in parts):
        raise ValueError(f"parts of the picture are for experts, one or more, got {list(parts)} of {list(mixture.experts)}")
    free = [name for name in mixture.experts if name not in parts]
    return [*([*free, name] for name in parts), free]


def _readers(
    pipe: Any, mixture: Mixture, prompt: str, parts: Mapping[str, RegionalPrompt], *, unprompted: Sequence[str] | None = None
) -> list[Callable[..., Any]]:
    """Functions that read each part's own prompt instead of `prompt`, and last one for `prompt`, as `texts_apart` takes
    them.

    Args:
        unprompted: the experts that read any other text; None: those that read the prompt.
    """

    def read(names: Sequence[str], own: str, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        whole, part = token_ids(pipe.tokenizer, [prompt, own]).to(ids.device)[:, None]  # [1, T] each
        asked = (ids == whole).all(1, keepdim=True)  # [B, 1]
        by = names if unprompted is None or asked.any() else unprompted
        return read_by(pipe, mixture, by, torch.where(asked, part, ids), *args, **kwargs)

    texts = [*(own for own, _ in parts.values()), prompt]
    return [partial(read, names, own) for names, own in zip(_names_by_text(mixture, parts), texts, strict=True)]
