"""Find words in a text: the tokens of the text, and where the phrases of experts are among them.

A token is a run of letters, a digit or a run of one mark, about as in CLIP. So a text has the same tokens whether it is
read as it is written or from the pieces that a tokenizer made of it, and "sks" is found in "sks_girl".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import NamedTuple

WITHOUT_SPACES = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # each letter of these scripts is a token
TOKEN = re.compile(rf"[^\W\d_{WITHOUT_SPACES}]+|\w|([^\w\s])\1*")
MOST_TOKENS = 4_000  # of a text that are read; a text encoder reads 77, or 512

Span = tuple[int, int]  # in a text: its first character, and the one after its last
Phrase = tuple[int, int]  # index of the expert, and of the phrase among the expert's


class Match(NamedTuple):
    """A phrase in a text: from the token `begin` to the one before `end`."""

    begin: int
    end: int
    of: tuple[Phrase, ...]

    @property
    def experts(self) -> tuple[int, ...]:
        """Whose phrase it is."""
        return tuple(dict.fromkeys(k for k, _ in self.of))


class Tokens:
    """The first tokens of a text: `words` in lower case, and their `spans`."""

    def __init__(self, text: str):
        self.text = text
        self._found = list(islice(TOKEN.finditer(text), MOST_TOKENS))
        self.words = [each[0].lower() for each in self._found]

    @cached_property
    def spans(self) -> list[Span]:
        """Where each token begins and ends."""
        return [each.span() for each in self._found]

    def span(self, begin: int, end: int) -> Span:
        """The characters of the tokens from `begin` to the one before `end`."""
        return self.spans[begin][0], self.spans[end - 1][1]


class Phrases:
    """What is looked for: [N], each expert's phrases. Their last word may be in the plural, and an underscore is a space."""

    def __init__(self, phrases: Sequence[Sequence[str]]):
        self._by_first: dict[str, list[tuple[tuple[str, ...], frozenset[str], Phrase]]] = {}
        for k, each in enumerate(phrases):
            for i, phrase in enumerate(each):
                if words := [word for word in Tokens(phrase).words if not _is_silent(word)]:
                    *before, last = words
                    forms = frozenset(_forms(last))
                    for first in before[:1] or forms:
                        self._by_first.setdefault(first, []).append((tuple(before), forms, (k, i)))

    def find(self, words: Sequence[str], counts: Callable[[Sequence[Phrase]], bool] = bool) -> list[Match]:
        """The matches in a text, from left to right. A phrase inside a longer one, of any expert, does not count.

        Args:
            counts: whether the phrases that stand at one place count. By default all do.
        """
        found: list[Match] = []
        furthest = 0
        at = [i for i, word in enumerate(words) if not _is_silent(word)]
        words = [words[i] for i in at]
        for begin, first in enumerate(words):
            if (candidates := self._by_first.get(first)) is None:
                continue
            here: dict[int, list[Phrase]] = {}
            for before, forms, phrase in candidates:
                last = begin + len(before)
                if last < len(words) and words[last] in forms and tuple(words[begin:last]) == before:
                    here.setdefault(last + 1, []).append(phrase)
            end = max((end for end, phrases in here.items() if counts(phrases)), default=0)
            if end > furthest:
                furthest = end
                found.append(Match(at[begin], at[end - 1] + 1, tuple(here[end])))
        return found


def _is_silent(word: str) -> bool:
    """Whether it is no part of a word: an underscore for a space, or A1111's backslash: "miku_\\(vocaloid\\)"."""
    return word[0] in "_\\"


def _forms(word: str) -> set[str]:
    """A word and its plurals."""
    forms = {word}
    if word[-1:].isalpha():
        forms |= {f"{word}s", f"{word}es"}
        for end, other in (("y", "ies"), ("fe", "ves"), ("f", "ves"), ("man", "men")):
            if word.endswith(end):
                forms.add(word.removesuffix(end) + other)
                break
    return forms


def spans(text: str, phrase: str) -> list[Span]:
    """Where one phrase is in a text, from left to right, without overlaps."""
    tokens, found = Tokens(text), list[Match]()
    for match in Phrases([[phrase]]).find(tokens.words):
        if not found or match.begin >= found[-1].end:
            found.append(match)
    return [tokens.span(match.begin, match.end) for match in found]


def by_expert(tokens: Tokens, matches: Sequence[Match], count: int) -> tuple[Mapping[Span, int], ...]:
    """[N]: where each expert's phrases are, and the index of that phrase."""
    words: list[dict[Span, int]] = [{} for _ in range(count)]
    for match in matches:
        for k, i in match.of:
            words[k].setdefault(tokens.span(match.begin, match.end), i)
    return tuple(words)
