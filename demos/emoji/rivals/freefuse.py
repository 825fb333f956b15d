"""FreeFuse: regions for several LoRAs, from a first pass without them, by similarity of the picture's features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mole_diffusers import Mixture
from mole_diffusers.binding import EVERYWHERE
from rivals.sampling_composers import check_encodes_by_expert
from rivals.unet_calls import StepCounter, replaced_forward

FIRST_PASS = 1 / 3  # share of the steps before regions are found
CORE = 0.1  # share of the tokens in a subject's core
ROUNDS, RATE, DECAY = 15, 0.01, 0.95  # of balancing the regions' areas


@contextmanager
def freefuse(pipe: Any, mixture: Mixture, subjects: Sequence[str]) -> Iterator[None]:
    """FreeFuse (arXiv 2510.23515): a first pass without LoRAs finds regions; then LoRAs are masked, from the same noise.

    After FIRST_PASS of the steps, S_c is the attention to the words of subject c. Its core is the share CORE of the tokens
    where N S_c - sum_{j != c} S_j is largest. Its map is the mean cosine of each token with the core, in the features
    from the self-attention of the same block. Its region is where its map is the highest, with balanced areas. Then in
    layers of the picture y = W x + sum_k M_k B_k A_k x. A LoRA does not act on words of another, and these words are
    closed in its region.

    The numbers are those of the authors' code for SDXL; the paper's first version has 1 % for the core. These parts are
    simpler, or taken from binding:

    - Maps are read in the layers that binding reads, scaled from 0 to 1 in each; the authors read one layer.
    - Cosines replace inner products in a softmax.
    - A vote of neighbours and a pull to each region's centre are left out.
    - Words are closed by 8 logits; the authors add 1 to a region's own words and subtract 1 from others'.

    Each picture of a batch has its own regions and its own calls. There are no regions for a single subject, or for a
    subject that the prompt does not name.

    Args:
        mixture: without binding; the files give the experts' words.
        subjects: the experts that get a region. Others, such as a style, act everywhere.

    Raises ValueError for a pipeline with several text encoders or without a UNet.
    """
    check_encodes_by_expert(pipe)
    words, steps = dict.fromkeys(mixture.experts, (None, EVERYWHERE)), StepCounter()
    bindings: list[dict[str, Any]] = []  # of each picture

    def run(*args: Any, **kwargs: Any) -> Any:
        if steps.at(args, kwargs) == 0:
            found = _first_pass(pipe, mixture, subjects, args, kwargs)
            bindings[:] = [words | {name: (None, region) for name, region in regions.items()} for regions in found]
        latents, text, pictures = args[0], kwargs["encoder_hidden_states"], len(bindings)
        drawn = []
        for i, binding in enumerate(bindings):
            own = {**kwargs, "encoder_hidden_states": text[i::pictures], "return_dict": False}
            with mixture.bound(binding):
                drawn.append(pipe.unet(latents[i::pictures], *args[1:], **own)[0])
        return (torch.stack(drawn, 1).flatten(0, 1),)

    with mixture.bound(words), replaced_forward(pipe.unet, run) if len(subjects) > 1 else nullcontext():
        yield


def _first_pass(
    pipe: Any, mixture: Mixture, subjects: Sequence[str], args: tuple, kwargs: dict
) -> list[dict[str, Image.Image]]:
    """The regions of each picture, found in the first steps without experts, from the latents that the UNet gets."""
    scheduler, (noisy, time, *rest) = deepcopy(pipe.scheduler), args
    groups = 2 if pipe.do_classifier_free_guidance else 1
    latents = (noisy / scheduler.scale_model_input(torch.ones_like(noisy), time)).chunk(groups)[0]
    with mixture.only(), mixture.trace(maps=True) as trace, _self_attention(pipe.unet) as features:
        for time in scheduler.timesteps[: max(1, round(FIRST_PASS * len(scheduler.timesteps)))]:
            noisy = scheduler.scale_model_input(torch.cat([latents] * groups), time)
            out = pipe.unet(noisy, time, *rest, **{**kwargs, "return_dict": False})[0].chunk(groups)
            score = out[0] + pipe.guidance_scale * (out[1] - out[0]) if groups > 1 else out[0]
            latents = scheduler.step(score, time, latents, return_dict=False)[0]
    pictures: list[dict[str, torch.Tensor]] = list(trace.maps.values())[-1] if trace.maps else [{}] * len(latents)
    found = []
    for i, maps in enumerate(pictures):
        named = {name: maps[name] for name in subjects if name in maps}
        found.append(regions(named, [z[i - len(pictures)] for z in features.values()]) if len(named) > 1 else {})
    return found


@contextmanager
def _self_attention(unet: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The last outputs of every self-attention, by its name: [B, T, C]."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, __: tuple, out: torch.Tensor) -> None:
        found[name] = out

    with ExitStack() as undo:
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                undo.callback(module.register_forward_hook(partial(keep, name)).remove)
        yield found


def regions(maps: Mapping[str, torch.Tensor], features: Sequence[torch.Tensor]) -> dict[str, Image.Image]:
    """The part of the picture that each subject gets, as a mask; no mask for one that would get no token.

    Args:
        maps: the attention to each subject's words, [h, w], all in the same unit.
        features: of each block, [T, C]. Those of the maps' size count.
    """
    side = next(iter(maps.values())).shape
    attended = torch.stack([map_.flatten() for map_ in maps.values()])  # [N, T]
    contrast = (len(maps) + 1) * attended - attended.sum(0)
    core = contrast.topk(max(1, int(CORE * contrast.shape[1]))).indices  # [N, k]
    likeness = torch.zeros_like(attended)
    for z in (each for each in features if len(each) == attended.shape[1]):
        z = F.normalize(z.float().cpu(), dim=-1)
        likeness += (z[core].mean(1)[:, None] * z).sum(-1)  # not a matrix product, which autocast would round
    low, high = likeness.amin(1, keepdim=True), likeness.amax(1, keepdim=True)
    owner = balanced_argmax((likeness - low) / (high - low).clamp_min(1e-12))  # [T]
    masks = {name: (owner == c).view(side) for c, name in enumerate(maps)}
    return {name: Image.fromarray(mask.numpy()).convert("L") for name, mask in masks.items() if mask.any()}


def balanced_argmax(maps: torch.Tensor) -> torch.Tensor:
    """Which of N maps is the highest at each token, [N, T] -> [T], with areas pulled towards 1 / N.

    Each of ROUNDS rounds lowers maps that have more than their share of the tokens, and raises maps that have less, by
    RATE of the maps' range. This step shrinks by DECAY.
    """
    count, tokens = maps.shape
    bias = maps.new_zeros(count, 1)
    for i in range(ROUNDS):
        areas = F.one_hot((maps - bias).argmax(0), count).sum(0)  # [N]
        bias = bias + (areas - tokens / count).sign()[:, None] * RATE * DECAY**i * (maps.max() - maps.min())
    return (maps - bias).argmax(0)
