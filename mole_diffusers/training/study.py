"""What gates are trained on: the lesson, what each term is built from, and the negatives of a caption."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mole_diffusers.mixture import Mixture
from mole_diffusers.training.clip import Clip
from mole_diffusers.training.data import Draw, Samples

Term = Callable[[Draw], torch.Tensor]  # the value of one objective on the rows of a draw


@dataclass
class Lesson:
    """What there is to learn from: words, and pictures if there are any.

    Attributes:
        singles: expert -> prompts that name it and no other expert.
        composed: prompts that name all experts.
        others: expert -> words that may stand in the place of its trigger ("fox": ["bear", "lemon"]), which makes
            captions that lack it.
        plain: prompts that name no expert.
        styles: experts that act on the whole picture, without a mask.
        parts: composed prompt -> a prompt for each of its subjects alone, left to right.
        samples: pictures with captions.
    """

    singles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    composed: Sequence[str] = ()
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)
    plain: Sequence[str] = ()
    styles: Sequence[str] = ()
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    samples: Samples | None = None

    def words(self) -> dict[str, Any]:
        """Everything but the pictures, as plain data."""
        mappings = {n: {k: list(v) for k, v in getattr(self, n).items()} for n in ("singles", "others", "parts")}
        return mappings | {n: list(getattr(self, n)) for n in ("composed", "plain", "styles")}


@dataclass
class Study:
    """What a term is built from. What a term keeps from one update to the next it keeps in `kept`, which is saved."""

    pipe: Any
    mixture: Mixture
    lesson: Lesson
    clip: Clip | None = None
    seed: int = 0
    kept: dict[str, Any] = field(default_factory=dict)


def triggers(mixture: Mixture, expert: str) -> list[str]:
    """The words that call an expert: its file's trigger words and its name."""
    return [*dict.fromkeys((*mixture.experts[expert].triggers, expert))]


def named(mixture: Mixture, prompt: str) -> list[str]:
    """The experts that a prompt calls by one of their words."""
    return [e for e in mixture.experts if any(_pattern(word).search(prompt) for word in triggers(mixture, e))]


def warn_of_missing_triggers(study: Study) -> None:
    """Warn of prompts that call none of an expert's words: it cannot show what it learned there."""
    lesson, mixture = study.lesson, study.mixture
    meant = [(prompt, list(mixture.experts)) for prompt in lesson.composed]
    meant += [(prompt, [name]) for name, prompts in lesson.singles.items() for prompt in prompts]
    for prompt, names in meant:
        for name in names:
            if name not in named(mixture, prompt):
                words = triggers(mixture, name)
                warnings.warn(f"the prompt {prompt!r} has no trigger of expert {name!r}: {words}", stacklevel=4)


def swap(prompt: str, word: str, other: str) -> str:
    """`prompt` with `other` in the place of `word`, and the article before it to match; unchanged where it is not there."""

    def put(found: re.Match) -> str:
        article = found[1] and ("an " if other[0].lower() in "aeiou" else "a ")
        return f"{article or ''}{other}"

    return _pattern(word).sub(put, prompt)


def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(rf"\b(an? )?{re.escape(word)}(?!\w)")


def negatives(study: Study, prompt: str) -> list[str]:
    """Captions that each lack a concept of `prompt`: one trigger swapped for another word, and the single prompts.

    Raises ValueError where there are none.
    """
    lesson = study.lesson
    swapped = [
        swap(prompt, word, other)
        for expert, others in lesson.others.items()
        for word in triggers(study.mixture, expert)
        for other in others
    ]
    found = [*dict.fromkeys([*swapped, *(p for prompts in lesson.singles.values() for p in prompts)])]
    found = [caption for caption in found if caption != prompt]
    if not found:
        raise ValueError(f"{prompt!r} has no caption to be told from: give single prompts, or other words for its concepts")
    return found


def need(found: Any, term: str, what: str) -> Any:
    """`found`; ValueError where it is missing or empty."""
    if not found:
        raise ValueError(f"the {term} term needs {what}")
    return found
