"""W-Switch and W-Composite: LoRA Switch and LoRA Composite, weighted by what each LoRA's words do to the prompt's text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from mole_diffusers import Mixture
from mole_diffusers.binding import spans
from mole_diffusers.training import token_ids
from rivals.sampling_composers import check_encodes_by_expert, composed_scores, in_turns

PERIOD, TAIL = 5, 5  # steps of the longest turn, and last steps, which belong to the first expert; of the paper's 100
LEAST = 0.05  # the smallest ablation weight, before they are made to sum to 1
SHORTEST = 5  # characters: what is left of a prompt and is shorter says nothing
NOTHING_LEFT = 2.0  # the ablation weight of words without which a prompt says nothing


def w_switched(
    pipe: Any, mixture: Mixture, prompt: str, *, period: int = PERIOD, tail: int = TAIL
) -> AbstractContextManager[None]:
    """W-Switch (arXiv 2606.03792): LoRA Switch whose turns are as long as `ablation_weights` say, see `turn_at`.

    Args:
        mixture: the first expert has the last steps, in the paper a character.
        prompt: what you call the pipeline with.

    Raises ValueError for a pipeline with several text encoders or without a UNet.
    """
    check_encodes_by_expert(pipe)
    weights = ablation_weights(pipe, mixture, prompt)
    return in_turns(pipe, mixture, partial(turn_at, weights, period=period, tail=tail))


def w_composed(pipe: Any, mixture: Mixture, prompt: str) -> AbstractContextManager[None]:
    """W-Composite (arXiv 2606.03792): LoRA Composite with `trigger_weights` for the predictions.

    Raises ValueError for a pipeline with several text encoders or without a UNet.
    """
    check_encodes_by_expert(pipe)
    return composed_scores(pipe, mixture, trigger_weights(pipe, mixture, prompt))


def turn_at(weights: Sequence[float], step: int, steps: int, *, period: int, tail: int) -> int:
    """The index of the expert whose turn it is at a step, from 0, of so many.

    A turn has max(1, round(period w_i / max_j w_j)) steps. Turns follow one another in the order of the experts, again and
    again. The last `tail` steps belong to the first expert.
    """
    if step >= steps - tail:
        return 0
    lengths = [max(1, round(period * weight / max(weights))) for weight in weights]
    within = step % sum(lengths)
    return next(i for i in range(len(lengths)) if within < sum(lengths[: i + 1]))


def ablation_weights(pipe: Any, mixture: Mixture, prompt: str) -> list[float]:
    """[N]: 1 - cos(text of the prompt, text of the prompt without the expert's words), LEAST or more, and then sum 1."""
    rest = [without_words(prompt, mixture.file_words[name].words) for name in mixture.experts]
    likeness = _likeness(pipe, mixture, prompt, rest)
    raw = [NOTHING_LEFT if len(left) < SHORTEST else max(1 - like, LEAST) for left, like in zip(rest, likeness, strict=True)]
    return [weight / sum(raw) for weight in raw]


def trigger_weights(pipe: Any, mixture: Mixture, prompt: str) -> list[float]:
    """[N]: cos(text of the prompt, text of the expert's words in it, or of all its words), and then sum 1."""
    own = []
    for name in mixture.experts:
        words = mixture.file_words[name].words
        own.append(", ".join([word for word in words if spans(prompt, word)] or words))
    likeness = _likeness(pipe, mixture, prompt, own)
    return [like / sum(likeness) for like in likeness]


def without_words(prompt: str, words: Sequence[str]) -> str:
    """The prompt without these words, and without doubled commas and spaces where they stood."""
    for word in words:
        for begin, end in reversed(spans(prompt, word)):
            prompt = prompt[:begin] + prompt[end:]
    return re.sub(r"\s+", " ", re.sub(r"\s*,(\s*,)+\s*", ", ", prompt)).strip(" ,")


@torch.no_grad()
def _likeness(pipe: Any, mixture: Mixture, prompt: str, texts: Sequence[str]) -> list[float]:
    """The cosine of each text with the prompt: of the mean of all token states, padding included, without experts."""
    ids = token_ids(pipe.tokenizer, [prompt, *texts]).to(pipe.text_encoder.device)
    with mixture.only():
        means = pipe.text_encoder(ids).last_hidden_state.double().mean(1)  # [1 + N, C]
    return F.cosine_similarity(means[:1], means[1:], -1).tolist()
