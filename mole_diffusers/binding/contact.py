"""Which two subjects touch, and how: "a koala riding a tiger", "an owl held by a bear", "a fox and an owl hugging".

In a picture they overlap, so neither has a part of it to itself, and one is in front of the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from mole_diffusers.binding import vocabulary as known
from mole_diffusers.binding.finding import Match, Span, Tokens
from mole_diffusers.binding.marking import AND, COMMA, DETERMINER, MARKER, NAME, POSSESSIVE, WORD, Mark

FRONT = {"riding": 0, "on": 0, "in front of": 0, "hugging": 0, "behind": 1, "holding": 1}  # relation -> who is in front
STACKED = ("riding", "on")  # relations in which the first is above the second
POSED = (
    "is are was were being that who which while gently tightly happily sitting sits seated standing stands lying lies"
    " perched resting rests sleeping sleeps balancing leaning leans waiting hiding hides peeking out from"
).replace(" ", "|")
HANDS = "(?:holding|holds|hold|shaking) hands|hand in hand|arm in arm|cheek to cheek"
MUTUAL, CARRYING, TOUCHING = map(known.one_of, (known.MUTUAL, known.CARRYING, known.TOUCHING - known.CARRYING))
SEATS = known.words("back shoulder shoulders head lap")
LEANING = "against|lean(?:s|ing) (?:on|upon)"
SAID = [  # what stands between two subjects, their relation, and whether the second is the one that does it
    (re.compile(rf"(?:^| )((?:(?:{POSED}) )*(?:{said}))$"), relation, is_passive)
    for said, relation, is_passive in (
        (r"(?:rid(?:es|ing)|straddl(?:es|ing)|mounted|astride)(?: (?:on|upon|atop|on top of))?", "riding", False),
        (r"ridden by", "riding", True),
        (r"in front of", "in front of", False),
        (r"behind", "behind", False),
        (rf"(?:{TOUCHING}|{HANDS})(?: (?:with|against|up to|up against))?|{LEANING}", "hugging", False),
        (r"(?:hugged|kissed|embraced|petted|cuddled|touched) by", "hugging", True),
        (rf"(?:{CARRYING})(?: (?:up|aloft))?", "holding", False),
        (r"(?:held|carried|lifted|cradled) by|in the (?:arms|hands?|paws?) of", "holding", True),
        (rf"(?:climb(?:s|ing) )?(?:on|upon|atop|onto|on top of|on the (?:{known.one_of(SEATS)}) of)", "on", False),
    )
]
FARTHEST = 10  # words of a noun phrase, or between two
OF_BOTH = re.compile(rf"(?:^| )((?:are )?(?:{MUTUAL}|hug|kiss|embrace|{HANDS}))(?= |$)")  # after a list of two
ASIDE = known.POSTURES | known.WEARING | known.RELATIVES | {"in", "with", "while"}  # what these begin may stand before it


class Touch(NamedTuple):
    """Two subjects that touch."""

    matches: tuple[Match, Match]  # what names the first and the second
    phrases: tuple[Span, Span]  # the tokens (begin, end) that are said of each of them
    relation: str  # a key of FRONT


class Subject(NamedTuple):
    """A name among a sentence's marks, and its noun phrase from the mark `begin` to the one before `end`."""

    match: Match
    at: int
    begin: int
    end: int


def touching(tokens: Tokens, marks: Sequence[Mark]) -> Iterator[Touch]:
    """The pairs of a sentence between whom words stand that say that they touch."""
    if len({k for mark in marks if mark.match is not None for k in mark.match.experts}) < 2:
        return
    subjects = [each for n, mark in enumerate(marks) if mark.match is not None and (each := _subject(marks, n, mark.match))]
    ends = {each.end for each in subjects}
    for first, second in zip(subjects, subjects[1:], strict=False):
        if _is_one_of_several(marks, first.begin, ends):
            continue
        between = " ".join(tokens.words[first.match.end : marks[second.begin].begin][-FARTHEST:])
        found = next(((m, relation, passive) for p, relation, passive in SAID if (m := p.search(between))), None)
        if found is None or set(first.match.experts) & set(second.match.experts):
            continue
        rest = marks[second.at + 1 : second.end]
        if rest and rest[0].kind == WORD and rest[-1].word not in known.PERSONS:  # "a tiger rug" is no tiger
            continue
        said, relation, is_passive = found
        stop = marks[second.begin].begin - len(between[said.start(1) :].split())
        if _is_aside([mark for mark in marks[first.at + 1 : second.begin] if mark.begin < stop]):
            matches = first.match, second.match
            phrases = (marks[first.begin].begin, stop), (marks[second.begin].begin, marks[second.end - 1].end)
            yield Touch(*((matches[::-1], phrases[::-1]) if is_passive else (matches, phrases)), relation)


def _is_one_of_several(marks: Sequence[Mark], begin: int, ends: Collection[int]) -> bool:
    """Whether a noun phrase is not all of who does something: "a fox and an owl riding a bear", "the shadow of a fox"."""
    before = marks[max(begin - 2, 0) : begin]
    if len(before) < 2:
        return False
    if before[1].word == "of":
        return before[0].kind == WORD and before[0].word not in known.MEDIA | known.GATHERINGS
    return before[1].kind == AND and begin - 1 in ends


def _subject(marks: Sequence[Mark], n: int, match: Match) -> Subject | None:
    """The noun phrase around a name; None for clothes, media, settings and styles."""
    begin, end = n, n + 1
    while begin > max(n - FARTHEST, 0) and marks[begin - 1].kind in (WORD, DETERMINER, NAME):
        begin -= 1
    while (
        end < min(n + FARTHEST, len(marks)) and marks[end].kind in (WORD, NAME) and marks[end].word[-2:] not in ("ly", "ed")
    ):
        end += 1
    head, before = marks[end - 1].word, [mark.word for mark in marks[max(begin - 2, 0) : begin]]
    if head in known.GARMENTS or known.is_scenery(head) or head in known.QUALITIES:
        return None
    if before[-1:] == ["in"] or (before[-1:] == ["by"] and not before[0].endswith(("ed", "en", "held"))):  # "in ink"
        return None
    if end < len(marks) and marks[end].kind == POSSESSIVE:
        if not SEATS.intersection(mark.word for mark in marks[end + 1 : end + 2]):  # "on an elephant's back"
            return None
        end += 2
    return Subject(match, n, begin, end)


def _is_aside(marks: Sequence[Mark]) -> bool:
    """Whether these marks after a name belong to it: "toy in a red hat", but not "watching a man"."""
    is_said = False  # whether the noun phrase is over
    for n, mark in enumerate(marks):
        is_said = is_said or mark.kind in (MARKER, COMMA)
        if mark.kind not in (WORD, NAME, DETERMINER, MARKER, COMMA) or mark.word in known.NOT:
            return False
        if mark.kind == MARKER and mark.word not in ASIDE:
            return False
        if mark.kind == DETERMINER and n and marks[n - 1].kind == COMMA:  # ", her hand holding"
            return False
        is_head = mark.kind in (WORD, NAME) and not (n + 1 < len(marks) and marks[n + 1].kind in (WORD, NAME))
        if is_said and is_head and not (mark.word in known.GARMENTS or mark.word in known.MEDIA or mark.word.endswith("ly")):
            return False
    return True
