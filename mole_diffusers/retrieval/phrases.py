"""Prompts as words: their phrases, and the trigger words in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

WORD = re.compile(r"[\w<>'’+-]+|[^\w\s]")
BREAKS = frozenset(
    ["and", "with", "of", "in", "on", "by", "at", "a", "an", "the", "under", "over", "near", "beside", "behind", "from",
     "to", "for", "as", "into"]
)  # fmt: skip
COMMON = ("photo", "drawing", "painting", "picture", "background", "person", "animal", "object", "style")
MAX_TRIGGER_WORDS = 8

Words = tuple[str, ...]


def tokenize(text: str) -> Words:
    """Lower-case words and punctuation marks, in order; "<new1>" and "sks-dog" are one word each."""
    return tuple(WORD.findall(text.lower()))


def phrases(tokens: Sequence[str]) -> list[str]:
    """The text between punctuation and function words: "ink drawing of a fox, at night" -> ink drawing; fox; night.

    A phrase made only of everyday words ("drawing") does not ask for a LoRA and is left out.
    """
    found: list[list[str]] = [[]]
    for token in tokens:
        if token in BREAKS or not re.search(r"\w", token):
            found.append([])
        else:
            found[-1].append(token)
    return [" ".join(phrase) for phrase in found if set(phrase) - set(COMMON)]


def find_triggers(tokens: Sequence[str], is_trigger: Callable[[Words], bool]) -> tuple[list[Words], list[str]]:
    """The triggers in a prompt, longest match first from left to right, and the tokens with a comma for each trigger."""
    found: list[Words] = []
    rest: list[str] = []
    at = 0
    while at < len(tokens):
        runs = (tuple(tokens[at : at + n]) for n in range(min(MAX_TRIGGER_WORDS, len(tokens) - at), 0, -1))
        run = next((run for run in runs if is_trigger(run)), None)
        if run is not None:
            found.append(run)
        rest.append(tokens[at] if run is None else ",")
        at += 1 if run is None else len(run)
    return found, rest
