"""Parse weights in a prompt, such as `(fox:1.3)`, into words, a weight for each character, and chunks.

The syntax is A1111's: (words) multiplies by 1.1, [words] divides by 1.1, and (words:1.3) multiplies by 1.3. A backslash
makes a bracket plain text, and BREAK begins a new chunk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

STEP = 1.1
MOST_NESTED = 50
MOST_WEIGHT = 100.0
PIECE = re.compile(r"\\[()\[\]\\]|[()\[\]]|[^\\()\[\]]+|\\")
NUMBER = re.compile(r":\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*$")
OF_OTHERS = re.compile(r"\{[^{}|]*\|[^{}]*\}|\b__[\w/*-]+__\b|(?<=\s)AND(?=\s)")  # a choice, a wildcard, two prompts
BREAK = "\0"
CLOSING = {"(": ")", "[": "]"}


class Fragment(NamedTuple):
    """Words in a chunk that have the same weight, and where they begin in it."""

    text: str
    weight: float
    start: int


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt that is encoded on its own, and the weight of each character."""

    text: str
    weights: tuple[float, ...]

    @property
    def has_weights(self) -> bool:
        return not set(self.weights) <= {1.0}

    @property
    def fragments(self) -> list[Fragment]:
        """The fragments in order."""
        found, start = [], 0
        for weight, run in groupby(self.weights):
            text = self.text[start : (end := start + len(list(run)))]
            if words := text.strip():
                found.append(Fragment(words, weight, start + text.index(words)))
            start = end
        return found

    @property
    def words(self) -> str:
        """The text as compel reads it: each fragment begins a new word."""
        return " ".join(fragment.text for fragment in self.fragments) if self.has_weights else self.text

    def spans(self, tokenizer: Any) -> list[tuple[int, int]]:
        """Where each of its tokens begins and ends in the text."""
        found = []
        for fragment in self.fragments:
            read = tokenizer(fragment.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            found += [(fragment.start + start, fragment.start + end) for start, end in read["offset_mapping"]]
        return found

    def __getitem__(self, part: slice) -> Chunk:
        text = self.text[part]
        start = (part.start or 0) + len(text) - len(text.lstrip())
        return Chunk(text.strip(), self.weights[start : start + len(text.strip())])


NOTHING = Chunk("", ())


def parse_weights(prompt: str) -> list[Chunk]:
    """Split a prompt into its chunks, at least one.

    Raises ValueError for a bracket that is not closed or not opened, for a weight beyond MOST_WEIGHT, and for the other
    things that A1111 allows in square brackets.
    """
    characters: list[str] = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []
    for piece in PIECE.findall(re.sub(r"\bBREAK\b", BREAK, prompt.replace(BREAK, " "))):
        if piece in ("(", "["):
            opened.append((piece, len(characters)))
            if len(opened) > MOST_NESTED:
                raise ValueError(f"brackets in a prompt are nested at most {MOST_NESTED} deep")
        elif piece in (")", "]"):
            if not opened or opened[-1][0] != ("(" if piece == ")" else "["):
                raise ValueError(f"the prompt has a {piece} that nothing opens; write \\{piece} for a plain bracket")
            start = opened.pop()[1]
            factor, end = _closed(piece, "".join(characters[start:]), start)
            del characters[end:], weights[end:]
            weights[start:] = [weight * factor for weight in weights[start:]]
        else:
            text = piece[1:] if piece[0] == "\\" and len(piece) == 2 else piece
            characters += text
            weights += [1.0] * len(text)
    if opened:
        bracket, start = opened[-1]
        rest = "".join(characters[start:]).strip()[:30]
        raise ValueError(f"the prompt does not close the {bracket} before {rest!r}; write \\{bracket} for a plain bracket")
    if any(abs(weight) > MOST_WEIGHT for weight in weights):
        raise ValueError(f"a weight in a prompt, with those around it, is at most {MOST_WEIGHT:g}")
    whole = Chunk("".join(characters), tuple(weights))
    edges = [-1, *(i for i, c in enumerate(whole.text) if c == BREAK), len(whole.text)]
    return [whole[a + 1 : b] for a, b in pairwise(edges)]


def plain_text(prompt: str) -> str:
    """The words of a prompt without weights and breaks. Raises what `parse_weights` raises."""
    return " ".join(chunk.text for chunk in parse_weights(prompt) if chunk.text)


def balanced(prompt: str) -> str:
    """A prompt with brackets in pairs, as A1111 reads it: a ) that closes nothing is text, and a ( left open ends with it.

    Tags, such as <lora:fox (old):1>, stay as they are.
    """
    pieces, opened = [], list[str]()
    for piece in re.findall(r"<[^<>]*>|\\.|[^\\<()\[\]]+|.", prompt, re.DOTALL):
        if piece in CLOSING:
            opened.append(CLOSING[piece])
        elif piece in CLOSING.values():
            piece = opened.pop() if piece in opened[-1:] else f"\\{piece}"
        pieces.append(piece)
    return "".join([*pieces, *reversed(opened)])


def read_as_words(prompt: str) -> list[str]:
    """What other programs do not read as words, and this one does: "{day|night}", "__animal__", AND between prompts."""
    found = dict.fromkeys(OF_OTHERS.findall(prompt))
    return [each for each in found if each != "AND" or prompt != prompt.upper()]


def _closed(bracket: str, inside: str, start: int) -> tuple[float, int]:
    """The factor of a pair of brackets, and where its words end."""
    number = NUMBER.search(inside)
    if bracket == ")":
        return (float(number[1]), start + number.start()) if number else (STEP, start + len(inside))
    if number or "|" in inside:
        raise ValueError(f"[{inside}] is not read: square brackets lower a weight here, and change no words between steps")
    return 1 / STEP, start + len(inside)
