"""Prompts as words: the phrases in them, and the trigger words that they say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

WORD = re.compile(r"[\w<>'’+-]+|[^\w\s]")
BREAKS = frozenset(
    ["and", "with", "of", "in", "on", "by", "at", "a", "an", "the", "under", "over", "near", "beside", "behind", "from",
     "to", "for", "as", "into"]
)  # fmt: skip
COMMON = ("photo", "drawing", "painting", "picture", "background", "person", "animal", "object", "style")
LONGEST = 8  # words of a trigger that are looked for


def tokenize(text: str) -> tuple[str, ...]:
    """Lower-case words and punctuation marks, in order; "<new1>" and "sks-dog" are one word each."""
    return tuple(WORD.findall(text.lower()))


def phrases(tokens: Sequence[str]) -> list[str]:
    """What stands between punctuation and small words: "ink drawing of a fox, at night" -> ink drawing; fox; night.

    A phrase of everyday words alone, "drawing", asks for no LoRA and is left out.
    """
    found: list[list[str]] = [[]]
    for token in tokens:
        if token in BREAKS or not re.search(r"\w", token):
            found.append([])
        else:
            found[-1].append(token)
    return [" ".join(phrase) for phrase in found if set(phrase) - set(COMMON)]


def find_triggers(
    tokens: Sequence[str], known: Callable[[tuple[str, ...]], bool]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """The runs of words that are `known`, longest first from left to right, and the tokens with each replaced by a comma."""
    found: list[tuple[str, ...]] = []
    rest: list[str] = []
    at = 0
    while at < len(tokens):
        runs = (tuple(tokens[at : at + n]) for n in range(min(LONGEST, len(tokens) - at), 0, -1))
        run = next((run for run in runs if known(run)), None)
        if run is not None:
            found.append(run)
        rest.append(tokens[at] if run is None else ",")
        at += len(run or (at,))
    return found, rest
