"""The words of a sentence, marked by what they do in a list: names, articles, "and", what begins what is said of a thing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from mole_diffusers.binding import vocabulary as known
from mole_diffusers.binding.finding import Match, Tokens

NAME, WORD, DETERMINER, MARKER, COMMA, AND, OR, BESIDE, SIDE, POSSESSIVE, JOINER, SILENT = range(12)
STOPS, COMMAS, JOINERS = frozenset(".;!?|。！？；"), frozenset(",，、–—"), frozenset("-_")
MAY_BEGIN_SIDE = known.IS | {"in", "on", "to", "at"}
MAY_BEGIN_BESIDE = known.words("next adjacent beside alongside above below to on left right as along together")
RELATIONS = {"left": ("x", True), "right": ("x", False), "above": ("y", True), "below": ("y", False)}
Side = tuple[str, bool]  # axis, and whether it is where coordinates are small


def sentences(tokens: Tokens, matches: Sequence[Match]) -> Iterator[tuple[int, int, list[Match]]]:
    """The sentences that have matches: (first token, the one after the last, matches)."""
    words, at = tokens.words, 0
    for i, match in enumerate(matches):
        if i < at:
            continue
        begin, end = match.begin, match.end
        while begin > 0 and not _stops(words, begin - 1):
            begin -= 1
        while end < len(words) and not _stops(words, end):
            end += 1
        at = i
        while at < len(matches) and matches[at].begin < end:
            at += 1
        yield begin, end, list(matches[i:at])


def _stops(words: Sequence[str], i: int) -> bool:
    word = words[i]
    if word == "break":
        return True
    if word == ":":
        return not (i + 1 < len(words) and words[i + 1].isdigit())
    return word[0] in STOPS and not (
        word == "." and 0 < i < len(words) - 1 and words[i - 1].isdigit() and words[i + 1].isdigit()
    )


@dataclass(slots=True)
class Mark:
    kind: int
    word: str
    begin: int
    end: int
    match: Match | None = None
    relation: Side | None = None


def marked(tokens: Tokens, begin: int, end: int, matches: Sequence[Match]) -> list[Mark]:
    """The words of a sentence with their kinds; matches, hyphened words and fixed phrases are one word each."""
    names, marks, i = _apart(matches), list[Mark](), begin
    while i < end:
        mark = _mark(tokens.words, i, end, names)
        if mark.kind == SILENT:
            pass
        elif marks and marks[-1].kind == JOINER and len(marks) > 1 and mark.kind != NAME:  # "red-haired"
            before = marks[-2]
            marks[-2 if before.kind != NAME else -1 :] = [
                Mark(WORD, mark.word if before.kind == NAME else f"{before.word}-{mark.word}", before.begin, mark.end)
            ]
        else:
            marks.append(mark)
        i = mark.end
    return [mark for mark in marks if mark.kind != JOINER]


def _apart(matches: Sequence[Match]) -> dict[int, Match]:
    """The matches by where they begin. Those that overlap name one thing together."""
    found: dict[int, Match] = {}
    last: Match | None = None
    for match in matches:
        if last is not None and match.begin < last.end:
            match = Match(last.begin, match.end, tuple(dict.fromkeys((*last.of, *match.of))))
        found[match.begin] = last = match
    return found


def _mark(words: Sequence[str], i: int, end: int, names: Mapping[int, Match]) -> Mark:
    """What stands at one place."""
    word = words[i]
    if (match := names.get(i)) is not None:
        return Mark(NAME, words[match.end - 1], i, match.end, match)
    if word[0] in JOINERS:
        return Mark(JOINER, word, i, i + 1)
    if word == ":":  # of a weight
        after = i + 1
        while after < end and (words[after].isdigit() or words[after] == "."):
            after += 1
        return Mark(SILENT, word, i, after)
    if word in MAY_BEGIN_SIDE and (stop := _side(words, i, end, names)) is not None:
        side = next(each for each in words[i:stop] if each in known.SIDES)
        return Mark(SIDE, side, i, stop, relation=known.SIDES[side])
    return (_beside(words, i, end) if word in MAY_BEGIN_BESIDE else None) or _one(words, i)


def _side(words: Sequence[str], i: int, end: int, starts: Collection[int]) -> int | None:
    """The end of words for a side of the picture that begin here; "on the left cheek" are none."""
    j = i
    if words[j] in known.IS and j + 1 < end:
        j += 1
    if words[j : j + 1] == ["in"] and words[j + 1 : j + 2] == ["the"] or words[j] in ("on", "to", "at"):
        if words[j + 1 : j + 2] != ["the"] or j + 2 >= end or words[j + 2] not in known.SIDES:
            return None
    else:
        return None
    j += 3
    if j < end and words[j] in ("side", "half", "part"):
        j += 1
    if j < end and words[j] == "of":
        rest = words[j + 1 : j + 3]
        if len(rest) < 2 or rest[0] != "the" or rest[1] not in known.MEDIA | {"canvas", "frame"}:
            return None
        j += 3
    if j < end and words[j] == "there":
        j += 1
    if j < end and words[j] in ("is", "are"):
        j += 1
    if j >= end or j in starts:
        return j
    return None if words[j].isalpha() and kind(words[j]) == WORD else j


def _beside(words: Sequence[str], i: int, end: int) -> Mark | None:
    """Words that say that one thing stands beside another."""
    here = words[i : min(i + 4, end)]
    if here[:2] == ["next", "to"] or here[:2] == ["adjacent", "to"]:
        return Mark(BESIDE, "next to", i, i + 2)
    if here[0] in ("beside", "alongside"):
        return Mark(BESIDE, here[0], i, i + 1)
    if here[0] in ("above", "below") and words[i - 1 : i] != ["from"]:
        return Mark(BESIDE, here[0], i, i + 1, relation=RELATIONS[here[0]])
    j = 2 if here[0] in ("to", "on") and here[1:2] == ["the"] else 0
    if here[j : j + 1] in (["left"], ["right"]) and here[j + 1 : j + 2] == ["of"]:
        return Mark(BESIDE, here[j], i, i + j + 2, relation=RELATIONS[here[j]])
    if here[:3] == ["as", "well", "as"]:
        return Mark(AND, "and", i, i + 3)
    if here[:2] in (["along", "with"], ["together", "with"]):
        return Mark(AND, "and", i, i + 2)
    return None


def _one(words: Sequence[str], i: int) -> Mark:
    """A word by itself."""
    word = words[i]
    if words[i : i + 2] == ["in", "front"]:
        return Mark(MARKER, "before", i, i + 2)
    if word == "s" and i and words[i - 1] in ("'", "’"):
        return Mark(POSSESSIVE, word, i, i + 1)
    if word[0] in COMMAS:
        return Mark(COMMA, word, i, i + 1)
    if word[0] in "&+":
        return Mark(AND, "and", i, i + 1)
    says_nothing = word in ("both", "either") or not word.isalnum()
    return Mark(SILENT if says_nothing else kind(word), word, i, i + 1)


@cache
def kind(word: str) -> int:
    if word in ("and", "plus"):
        return AND
    if word in ("or", "versus", "vs"):
        return OR
    if word in known.DETERMINERS or word.isdigit():
        return DETERMINER
    if word in known.MEDIA:
        return WORD
    if word in known.PREPOSITIONS or word in known.VERBS or word in known.HAVING or word in known.INTRODUCING:
        return MARKER
    if word.endswith("ing") and len(word) > 4 and word not in known.NO_VERBS:
        return MARKER
    return WORD
