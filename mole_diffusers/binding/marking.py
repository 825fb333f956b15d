"""The words of a sentence, marked by what they do in a list: names, articles, "and", what begins what is said of a
subject.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise

from mole_diffusers.binding import vocabulary as known
from mole_diffusers.binding.finding import Match, Tokens

NAME, WORD, DETERMINER, MARKER, COMMA, AND, OR, BESIDE, SIDE, POSSESSIVE, JOINER, SILENT = range(12)
QUOTES = frozenset('"“”„«»')
STOPS, COMMAS, JOINERS = frozenset(".;!?|。！？；"), frozenset(",，、–—"), frozenset("-_")
APOSTROPHES = ("'", "’")
SINGLE_QUOTES = (*APOSTROPHES, "‘")
Side = tuple[str, bool]  # axis, and whether it is where coordinates are small
SIDES = {"left": ("x", True), "right": ("x", False), "top": ("y", True), "bottom": ("y", False)}
RELATIONS = {"left": ("x", True), "right": ("x", False), "above": ("y", True), "below": ("y", False)}
_IS, _WHOLE = known.one_of(known.IS), known.one_of(known.MEDIA | {"canvas", "frame"})
ON_A_SIDE = re.compile(  # words for a side of the picture; "on the left cheek" are none
    rf"(?:(?:{_IS}) )?(?:(?:in|on|to|at) the (?:far )?|(?=\w+ of frame ))(left|right|top|bottom)(?: (?:side|half|part))?"
    rf"(?: of (?:the )?(?:{_WHOLE})|(?! of ))(?: there)?(?: (?:is|are))? "
)
LABELLED = re.compile(r"(?:(left|right)(?: side)? : |\( (left|right)(?: side)? \) )")  # "left: a fox", "a fox (left)"
STANDS_BESIDE = re.compile(r"(?:(?:next|adjacent) to|beside|alongside|(?:(?:to|on) the )?(left|right) of|(above|below)) ")
AS_WELL = re.compile(r"(?:as well as|along with|together with) ")
MAY_BEGIN = known.IS | known.words("in on to at next adjacent beside alongside above below left right as along together (")
LONGEST = 10  # words of these


def sentences(tokens: Tokens, matches: Sequence[Match]) -> Iterator[tuple[int, int, list[Match]]]:
    """The sentences that have matches: (first token, the one after the last, matches)."""
    inside = {i for match in matches for i in range(match.begin, match.end)}
    ends = [i for i in range(len(tokens.words)) if i not in inside and is_stop(tokens.words, i)]
    begins = [match.begin for match in matches]
    for before, end in pairwise([-1, *ends, len(tokens.words)]) if matches else ():
        if named := matches[bisect_left(begins, before) : bisect_left(begins, end)]:
            yield before + 1, end, list(named)


def is_stop(words: Sequence[str], i: int) -> bool:
    word = words[i]
    if word == ":":
        return not words[i + 1 : i + 2] or not (words[i + 1].isdigit() or _is_after_a_side(words, i))
    if word[0] not in STOPS:
        return word == "break"
    around = [*words[max(i - 1, 0) : i], *words[i + 1 : i + 2]]
    return word != "." or len(around) < 2 or not all(each.isdigit() for each in around)


def _is_after_a_side(words: Sequence[str], colon: int) -> bool:
    """Whether what stands before a colon is a side of the picture: "left: a fox", but not "from left to right: a fox"."""
    before = [*words[max(colon - 3, 0) : colon]]
    if before[-1:] == ["side"]:
        before.pop()
    is_side = before[-1:] in (["left"], ["right"])
    return is_side and (len(before) == 1 or before[-2] in ("the", "far") or before[-2][0] in STOPS | COMMAS)


def quoted(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The words that are written in the picture, as on a sign: each token between double quotes, or between single ones
    after a word such as "titled", and the end of what it may name; for the first one, that is the end of the quotation. A
    prompt that is all in quotes has none.
    """
    at = [i for i, word in enumerate(words) if word[0] in QUOTES and not words[max(i - 1, 0)].isdigit()]  # not inches
    for begin, end in chain(zip(at[::2], at[1::2], strict=False), _in_single_quotes(words)):
        if begin or end < len(words) - 1:
            yield begin + 1, end
            yield from ((i, -1) for i in range(begin + 2, end))


def _in_single_quotes(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where single quotes open and close after a word for what is written: "a poster titled 'fox and owl'"."""
    at = [i for i, word in enumerate(words) if word in SINGLE_QUOTES and words[i + 1 : i + 2] != ["s"]]
    yield from ((begin, end) for begin, end in pairwise(at) if _is_written(words, begin))


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
        of = words[match.end : match.end + 2]  # what follows: a "fox shaped" or "fox-like" subject is no fox
        is_like = of[:1] == ["-"] and (of[-1] == "like" or of[-1].endswith("ed")) or known.LIKE.intersection(of[:1])
        if is_like or _is_written(words, i):
            return Mark(WORD, word, i, match.end)
        return Mark(NAME, words[match.end - 1], i, match.end, match)
    if word.isalpha() and words[i + 2 : min(i + 3, end)] == [word] and words[i + 1] in ("in", "to", "by"):
        return Mark(MARKER, word, i, i + 3)  # "arm in arm"
    if word[0] in JOINERS and word != "--":  # a weight, as "++" is
        return Mark(JOINER, word, i, i + 1)
    if word == ":":  # of a weight
        after = i + 1
        while after < end and (words[after].isdigit() or words[after] == "."):
            after += 1
        return Mark(SILENT, word, i, after)
    return (_phrase(words, i, end, names) if word in MAY_BEGIN else None) or _one(words, i)


def _is_written(words: Sequence[str], i: int) -> bool:
    """Whether what begins here is a text in the picture: "the name miku", "a sign that says the fox"."""
    before = words[max(i - 3, 0) : i]
    while before and (before[-1] == ":" or before[-1] in known.DETERMINERS):
        before = before[:-1]
    return bool(before) and before[-1] in known.WRITTEN


def _phrase(words: Sequence[str], i: int, end: int, names: Mapping[int, Match]) -> Mark | None:
    """Words for a side of the picture, or that one thing stands beside another."""
    text = " ".join(words[i : min(i + LONGEST, end)]) + " "
    if found := ON_A_SIDE.match(text):
        stop = i + found[0].count(" ")
        if stop >= end or stop in names or not words[stop].isalpha() or kind(words[stop]) != WORD:
            return Mark(SIDE, words[i], i, stop, relation=SIDES[found[1]])
    if found := LABELLED.match(text):
        stop = i + found[0].count(" ")
        if found[2] or _is_after_a_side(words, stop - 1):
            return Mark(SIDE, words[i], i, stop, relation=SIDES[found[1] or found[2]])
    if (found := STANDS_BESIDE.match(text)) and not (found[2] and words[max(i - 1, 0)] == "from"):  # "seen from above"
        side = found[1] or found[2]
        return Mark(BESIDE, side or found[0].strip(), i, i + found[0].count(" "), relation=RELATIONS.get(side))
    found = AS_WELL.match(text)
    return Mark(AND, "and", i, i + found[0].count(" ")) if found else None


def _one(words: Sequence[str], i: int) -> Mark:
    """A word by itself."""
    word = words[i]
    if words[i : i + 2] == ["in", "front"]:
        return Mark(MARKER, "before", i, i + 2)
    if word == "s" and i and words[i - 1] in APOSTROPHES:
        return Mark(POSSESSIVE, word, i, i + 1)
    if word in APOSTROPHES and words[max(i - 1, 0)][-1] == "s" and words[i + 1 : i + 2] and words[i + 1][0].isalpha():
        return Mark(POSSESSIVE if kind(words[i + 1]) == WORD else SILENT, word, i, i + 1)  # "foxes' tails"
    if word[0] in COMMAS:
        return Mark(COMMA, word, i, i + 1)
    if word in ("&", "+"):  # "++" is a weight
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
    if word in known.MEDIA or word in known.SETTINGS:
        return WORD
    if word in known.PREPOSITIONS or word in known.VERBS or word in known.HAVING or word in known.INTRODUCING:
        return MARKER
    if word.endswith("ing") and len(word) > 4 and word not in known.NO_VERBS:
        return MARKER
    return WORD
