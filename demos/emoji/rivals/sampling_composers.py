"""Composers that act while sampling: LoRA Switch, LoRA Composite and K-LoRA, as contexts on a mixture with equal gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from mole_diffusers import Mixture
from mole_diffusers.merging import Layer, layers_of, merge_key
from rivals.unet_calls import StepCounter, before_forward, replaced_forward, sampling_steps

Forward = Callable[
    [Any, Sequence[torch.Tensor], tuple, dict], Any
]  # (unet, texts, args, kwargs) in place of the UNet's forward
ALPHA, BETA = 1.5, 0.5  # of K-LoRA
ATTENTION = ("to_q", "to_k", "to_v", "to_out_0")  # the layers for which K-LoRA chooses, in layer keys


def switched(pipe: Any, mixture: Mixture, *, period: int = 5) -> AbstractContextManager[None]:
    """LoRA Switch (arXiv 2402.16843, sec. 3.2): one expert at a time, each for `period` steps with its own text.

    The order is that of the mixture (in the paper: characters first). The released code gives the first expert one step
    more than the others.
    """
    return in_turns(pipe, mixture, lambda step, steps: step // period % len(mixture.experts))


def in_turns(pipe: Any, mixture: Mixture, turn: Callable[[int, int], int]) -> AbstractContextManager[None]:
    """One expert at a time with its own text: that of index `turn(step, steps)` in a step (from 0) of so many."""
    names, counter = list(mixture.experts), StepCounter()

    def run(unet: Any, texts: Sequence[torch.Tensor], args: tuple, kwargs: dict) -> Any:
        index = turn(counter.at(args, kwargs), sampling_steps(pipe))
        with mixture.only(names[index]):
            return unet(*args, **{**kwargs, "encoder_hidden_states": texts[index]})

    return _encoded_by_expert(pipe, mixture, run)


def composed_scores(pipe: Any, mixture: Mixture, weights: Sequence[float] | None = None) -> AbstractContextManager[None]:
    """LoRA Composite (arXiv 2402.16843, eq. 6): the mean over experts of each one's own prediction, guided as one.

    Args:
        weights: [N], of that mean; None for equal ones.
    """
    names = list(mixture.experts)

    def run(unet: Any, texts: Sequence[torch.Tensor], args: tuple, kwargs: dict) -> Any:
        found = []
        for name, text in zip(names, texts, strict=True):
            with mixture.only(name):
                found.append(unet(*args, **{**kwargs, "encoder_hidden_states": text, "return_dict": False})[0])
        scores = torch.stack(found)  # [N, B, C, H, W]
        if weights is None:
            return (scores.mean(0),)
        shares = torch.tensor(weights).to(scores).reshape(-1, 1, 1, 1, 1)
        return ((shares * scores).sum(0) / shares.sum(),)

    return _encoded_by_expert(pipe, mixture, run)


def check_encodes_by_expert(pipe: Any) -> None:
    """Raises ValueError for a pipeline in which a text cannot be read in several ways."""
    if getattr(pipe, "unet", None) is None or getattr(pipe, "text_encoder_2", None) is not None:
        raise ValueError(f"needs a unet and one text encoder, unlike {type(pipe).__name__}")


def read_by(pipe: Any, mixture: Mixture, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """The text encoder's output with these experts alone."""
    with mixture.only(*names):
        return pipe.text_encoder(*args, **kwargs)


@contextmanager
def _encoded_by_expert(pipe: Any, mixture: Mixture, run: Forward) -> Iterator[None]:
    """`texts_apart` with the prompt as each expert's text encoder reads it, while the picture is drawn as one."""
    with mixture.tiled(0), texts_apart(pipe, [partial(read_by, pipe, mixture, [name]) for name in mixture.experts], run):
        yield


@contextmanager
def texts_apart(pipe: Any, readers: Sequence[Callable[..., Any]], run: Forward) -> Iterator[None]:
    """Call `run(unet, texts, args, kwargs)` instead of the UNet, with a text for each of `readers`.

    A reader is called like the text encoder. The states of all go through the pipeline concatenated along the channels,
    [B, T, N * C]. Raises ValueError for a pipeline with several text encoders or without a UNet. So does a call with
    `clip_skip`, whose states go through a norm of C channels.
    """
    check_encodes_by_expert(pipe)

    def encode(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_hidden_states"):
            raise ValueError("this composer takes no clip_skip: draw inside studio.clip_skip.clip_skip(pipe, clip_skip + 1)")
        found = [read(*args, **kwargs) for read in readers]
        found[0].last_hidden_state = torch.cat([out.last_hidden_state for out in found], -1)
        return found[0]

    def denoise(*args: Any, **kwargs: Any) -> Any:
        return run(pipe.unet, kwargs["encoder_hidden_states"].chunk(len(readers), -1), args, kwargs)

    with replaced_forward(pipe.text_encoder, encode), replaced_forward(pipe.unet, denoise):
        yield


def last_content(layers: Mapping[str, Layer]) -> dict[str, float]:
    """K-LoRA (arXiv 2502.18461): the share of sampling up to which each layer uses the content LoRA, then the style LoRA.

    Layer -> p*, where S_c = gamma (ALPHA p + BETA) S_s and S is the sum of the r_c r_s largest entries of |delta W|.
    Below 0 the layer always has the style, above 1 always the content. gamma = sum |delta_c| / sum |delta_s| over all
    layers.

    Args:
        layers: (content, style) of each layer. Layers that only one of them has are left out.
    """
    deltas = {k: (c.delta(), s.delta(), c.rank * s.rank) for k, (c, s) in layers.items() if c is not None and s is not None}
    gamma = sum(c.abs().sum() for c, _, _ in deltas.values()) / sum(s.abs().sum() for _, s, _ in deltas.values())
    return {
        key: float((_largest(content, count) / (gamma * _largest(style, count)) - BETA) / ALPHA)
        for key, (content, style, count) in deltas.items()
    }


def _largest(delta: torch.Tensor, count: int) -> torch.Tensor:
    return delta.abs().flatten().topk(min(count, delta.numel())).values.sum()


@contextmanager
def k_lora(pipe: Any, mixture: Mixture, *, content: str, style: str) -> Iterator[None]:
    """K-LoRA on a mixture of a content and a style expert: one of the two per layer and step.

    Layers outside the denoiser's attention, and those that one of the two lacks, keep the sum.

    Raises ValueError for other experts, or gates that are not one per matrix.
    """
    names, steps = list(mixture.experts), StepCounter()
    if sorted(names) != sorted((content, style)) or (config := mixture.config.to_dict()).get("granularity") != "matrix":
        raise ValueError(f"K-LoRA takes two experts and a gate per matrix (granularity), got {names} and {config}")
    pair = {name: (mixture.experts[name], mixture.strength(name)) for name in (content, style)}
    until = last_content({k: v for k, v in layers_of(pair).items() if k.startswith("unet.") and k.endswith(ATTENTION)})

    share = 0.0  # of sampling so far

    def count(_: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal share
        share = steps.at(args, kwargs) / sampling_steps(pipe)

    def chosen(place: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if (key := merge_key(place)) not in until:
            return gates
        name = content if share <= until[key] else style
        return gates.new_tensor([float(each == name) for each in names])

    with before_forward(pipe.unet, count), mixture.adjusted(chosen):
        yield
