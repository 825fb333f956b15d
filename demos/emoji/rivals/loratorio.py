"""LoRAtorio: one prediction for each LoRA, weighed patch by patch by how far it is from the base's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from mole_diffusers import Mixture
from rivals.sampling_composers import read_by, texts_apart
from rivals.unet_calls import prompted_rows

PATCH = 4  # latent pixels on each side of a patch
TEMPERATURE = 1.0  # of the softmin
CENTRE = 0.5  # the base's share of the unconditional prediction


@contextmanager
def loratorio(pipe: Any, mixture: Mixture, *, patch: int = PATCH, temperature: float = TEMPERATURE) -> Iterator[None]:
    """LoRAtorio (arXiv 2508.11624): e = sum_i W_i e_i, with W the softmin over LoRAs of each patch's cosine with the base.

    e_i is the prediction of LoRA i alone, with the text as its own text encoder reads it; e_0 that of the base.
    W_i = softmax_i(-cos(e_i, e_0) / temperature) in each patch of the conditional predictions: a LoRA has more weight where
    it changes more. Unconditional predictions take the same W, and are drawn towards the base ("re-centring"):
    CENTRE e_0 + (1 - CENTRE) sum_i W_i e_i. This takes one UNet call for each LoRA, plus one.

    The choice of the most relevant LoRAs among many is left out: all of the mixture take part.

    Args:
        patch: side of a patch in latent pixels. Patches at the right and lower edges may be smaller.
        temperature: of the softmin.

    Raises ValueError for a pipeline with several text encoders or without a UNet.
    """
    models: list[list[str]] = [[], *([name] for name in mixture.experts)]

    def run(unet: Any, texts: Sequence[torch.Tensor], args: tuple, kwargs: dict) -> Any:
        found = []
        for names, text in zip(models, texts, strict=True):
            with mixture.only(*names):
                found.append(unet(*args, **{**kwargs, "encoder_hidden_states": text, "return_dict": False})[0])
        base, experts = found[0], torch.stack(found[1:])  # [B, C, H, W], [N, B, C, H, W]
        prompted = prompted_rows(pipe, args[0])  # [B]
        weights = patch_weights(base[prompted], experts[:, prompted], patch, temperature)  # [N, pictures, 1, H, W]
        mixed = (weights.repeat(1, len(base) // weights.shape[1], 1, 1, 1) * experts).sum(0)
        return (torch.where(prompted[:, None, None, None], mixed, CENTRE * base + (1 - CENTRE) * mixed),)

    with mixture.tiled(0), texts_apart(pipe, [partial(read_by, pipe, mixture, names) for names in models], run):
        yield


def patch_weights(base: torch.Tensor, experts: torch.Tensor, patch: int, temperature: float) -> torch.Tensor:
    """The softmin over N experts of each patch's cosine with the base, at each place: [N, B, 1, H, W].

    Args:
        base: [B, C, H, W].
        experts: [N, B, C, H, W].
    """

    def by_patch(products: torch.Tensor) -> torch.Tensor:
        """Means over channels and patches: [N, B, C, H, W] -> [N, B, h, w]."""
        return F.avg_pool2d(products.mean(2), patch, ceil_mode=True)

    own, others = base.float()[None], experts.float()
    lengths = (by_patch(own.square()) * by_patch(others.square())).sqrt().clamp_min(1e-12)
    weights = torch.softmax(-by_patch(own * others) / lengths / temperature, 0)
    places = weights.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return places[:, :, None, : base.shape[2], : base.shape[3]].to(experts.dtype)
