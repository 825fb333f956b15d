"""Subject or style in each layer: the LoRA that moves the layer's features farther from the base's, by KL divergence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from mole_diffusers import Mixture
from rivals.unet_calls import replaced_forward


@contextmanager
def kl_choice(pipe: Any, mixture: Mixture) -> Iterator[None]:
    """Feature-level selection of arXiv 2602.15539: in each layer and step, the LoRA with the larger KL(base || base + LoRA).

    f_0 = W x and f_k = W x + B_k A_k x are a layer's features. It gives f_k with the largest divergence from f_0. Each row
    of the batch chooses for itself. The text encoder keeps the sum. The layers of the UNet are computed once without LoRAs
    and once with each.

    The paper's second part is left out: gradients of CLIP and DINO scores that move the latents. It needs these models and
    reference pictures.

    Args:
        mixture: with a gate per matrix, so that LoRAs can change within a block. The paper has two, a subject and a style.

    Raises ValueError for other gates.
    """
    if (config := mixture.config.to_dict()).get("granularity") != "matrix":
        raise ValueError(f"a choice in each layer needs a gate per matrix (granularity), got {config}")

    def choose(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with mixture.only():
            base = layer(x, *args, **kwargs)
        found = []
        for name in mixture.experts:
            with mixture.only(name):
                found.append(layer(x, *args, **kwargs))
        features = torch.stack(found)  # [N, B, ...]
        best = divergences(base, features).argmax(0)  # [B]
        return features[best, torch.arange(len(best), device=best.device)]

    with mixture.tiled(0), ExitStack() as undo:
        for _, layers in mixture.layers_by_gate():
            for name in layers:
                part, _, module = name.partition(".")
                if part == "unet":
                    layer = pipe.unet.get_submodule(module)
                    undo.enter_context(replaced_forward(layer, partial(choose, layer)))
        yield


def divergences(base: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """KL(softmax of the base's channels || softmax of an expert's), mean over tokens: [N, B].

    Args:
        base: [B, C], [B, T, C] or [B, C, H, W].
        features: [N, ...].
    """

    def as_tokens(x: torch.Tensor) -> torch.Tensor:
        """[B, C], [B, T, C] or [B, C, H, W] -> [B, T, C]."""
        rows = x.movedim(1, -1) if x.dim() == 4 else x
        return rows.reshape(len(x), -1, rows.shape[-1])

    log_p = torch.log_softmax(as_tokens(base).float(), -1)  # [B, T, C]
    log_q = torch.log_softmax(torch.stack([as_tokens(each) for each in features]).float(), -1)  # [N, B, T, C]
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
