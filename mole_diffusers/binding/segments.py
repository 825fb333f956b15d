"""A sentence in segments: noun phrases with what is said of them, "sks woman | in zwx dress", between commas and "and"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mole_diffusers.binding import vocabulary as known
from mole_diffusers.binding.finding import Match
from mole_diffusers.binding.marking import (
    AND,
    BESIDE,
    COMMA,
    DETERMINER,
    MARKER,
    NAME,
    OR,
    POSSESSIVE,
    SIDE,
    WORD,
    Mark,
    Side,
)

JOINTS = {COMMA: ",", AND: "and", OR: "or", BESIDE: "beside"}


@dataclass(slots=True)
class Segment:
    """A part of a sentence between commas, "and" and the like. Numbers are places among the text's tokens.

    Attributes:
        joint: what joins it to the segment before: "", ",", "and", ", and", "beside" or "or".
        begin, end: the noun phrase. stop: the end of what is said of it.
        name: what names the thing; None if no expert's words do.
        others: the matches that say more of it: what it wears, or holds.
        styles: the matches before it that name a medium: "ink" in "ink drawing of a fox".
        head: the last word of the noun phrase.
        marker: the verb or preposition with which begins what is said of it; "" if nothing is.
        has_object: whether that has an object: "holding a cup", not "smiling". `object` is its last word.
        is_said: whether the whole segment is said of what precedes: "holding a cup".
        is_introduced: whether a medium precedes: "a photo of a fox".
        is_clause: whether it is a sentence of its own: "a fox is in a tree". is_of: "a piece of fruit".
        is_mixed: whether several experts' words stand in its noun phrase. is_behind: "in the background".
        side: "on the left".
        relation: of a "beside": the axis, and whether the segment before has the smaller coordinate.
    """

    joint: str = ""
    begin: int = -1
    end: int = -1
    stop: int = -1
    name: Match | None = None
    others: list[Match] = field(default_factory=list)
    styles: list[Match] = field(default_factory=list)
    head: str = ""
    words: list[str] = field(default_factory=list)
    is_determined: bool = False
    marker: str = ""
    has_object: bool = False
    object: str = ""
    object_is_determined: bool = False
    is_said: bool = False
    is_introduced: bool = False
    is_mixed: bool = False
    is_behind: bool = False
    is_clause: bool = False
    is_of: bool = False
    side: Side | None = None
    relation: Side | None = None

    @property
    def is_scenery(self) -> bool:
        return self.head in known.MEDIA or self.head in known.SETTINGS or self.is_behind

    @property
    def is_thing(self) -> bool:
        """Whether it names a thing of an expert."""
        unclear = self.is_said or self.is_mixed or self.is_scenery
        return self.name is not None and not unclear and not known.QUALITIES.issuperset(self.words)

    @property
    def is_noun(self) -> bool:
        """Whether it names a thing of nobody: "a lemon"."""
        plain = self.name is None and 0 < len(self.words) <= 4 and not self.is_of
        return plain and not (self.is_said or self.is_mixed or self.is_scenery)

    def absorb(self, part: Segment) -> None:
        """Make another segment a part of what is said of this one."""
        self.others += [*part.others, *([part.name] if part.name is not None and not part.is_scenery else [])]
        self.styles += part.styles
        self.marker = part.marker or self.marker or part.joint
        self.has_object = self.has_object or part.has_object or not part.is_said
        if part.has_object or part.head:
            self.object = part.object or part.head
            self.object_is_determined = part.object_is_determined or part.is_determined
        self.stop, self.side = max(self.stop, part.stop), self.side or part.side
        self.is_behind = self.is_behind or part.is_behind

    @property
    def is_clothing(self) -> bool:
        return self.head in known.GARMENTS

    @property
    def is_person(self) -> bool:
        return self.head in known.PERSONS


def segments_of(marks: Sequence[Mark]) -> list[Segment]:
    """The segments of a sentence."""
    segments, now, joint = list[Segment](), Segment(), ""
    for n, mark in enumerate(marks):
        if mark.kind not in JOINTS or _joins_qualities(now, marks, n):
            _add(now, marks, n)
            continue
        side = now.side
        is_empty = now.begin < 0 and not now.is_said
        if not is_empty:
            segments.append(now)
            joint, side = JOINTS[mark.kind], None
        elif joint and mark.kind != COMMA:
            joint = ", and" if (joint, mark.kind) == (",", AND) else JOINTS[mark.kind]
        now = Segment(joint if segments else "", side=side, relation=mark.relation)
    if now.begin >= 0 or now.is_said:
        segments.append(now)
    return segments


def _joins_qualities(now: Segment, marks: Sequence[Mark], n: int) -> bool:
    """Whether an "and" stands between adjectives, as in "a black and white cat"."""
    if marks[n].kind != AND or now.name is not None or now.marker or not now.words or n + 1 == len(marks):
        return False
    return known.QUALITIES.issuperset(now.words) and marks[n + 1].kind in (WORD, NAME)


def _add(now: Segment, marks: Sequence[Mark], n: int) -> None:
    """Add one word to the segment that it stands in."""
    mark = marks[n]
    if mark.kind == SIDE:
        now.side = mark.relation
        return
    if now.begin < 0 and not (mark.kind == MARKER and mark.word in known.INTRODUCING):
        now.begin = mark.begin
    now.stop = mark.end
    if now.marker or now.is_said:
        _add_to_what_is_said(now, mark, marks[n - 1])
    elif mark.kind == MARKER and not _is_adjective(now, marks, n):
        _end_noun_phrase(now, mark)
    elif now.is_of:
        now.end = mark.end
        now.others += [] if mark.match is None else [mark.match]
    else:
        _add_to_noun_phrase(now, mark, marks[n - 1] if n else None)


def _add_to_noun_phrase(now: Segment, mark: Mark, before: Mark | None) -> None:
    if mark.kind == DETERMINER and (now.words or now.name is not None):  # "holds a cup"
        now.marker, now.has_object, now.object_is_determined = mark.word, True, True
        now.is_said = now.name is None and not now.is_determined
        return
    now.end = mark.end
    if mark.kind == DETERMINER:
        now.is_determined = True
    elif mark.kind == POSSESSIVE:
        if now.name is not None:  # "sks man's dog" is no thing of the expert
            now.others.append(now.name)
            now.name, now.is_determined = None, True
    else:
        if mark.match is not None and now.name is not None and _experts(now.name) != _experts(mark.match):
            now.is_mixed = now.is_mixed or before is None or before.kind != NAME
            now.others.append(now.name)
            now.name = mark.match
        now.name = now.name or mark.match
        now.words.append(mark.word)
        now.head = mark.word


def _experts(match: Match) -> set[int]:
    return {k for k, _ in match.of}


def _is_adjective(now: Segment, marks: Sequence[Mark], n: int) -> bool:
    """Whether a word that looks like a verb stands between an article and its noun: "a smiling woman"."""
    mark = marks[n]
    if not mark.word.endswith("ing") or mark.word in known.INTRODUCING:
        return False
    if not now.is_determined or now.name is not None or n + 1 >= len(marks):
        return False
    follows = marks[n + 1].kind in (WORD, NAME)
    return follows and (not now.words or mark.word not in known.VERBS)


def _end_noun_phrase(now: Segment, mark: Mark) -> None:
    """A verb or a preposition ends the noun phrase, unless it only introduces the thing: "a photo of"."""
    is_introduction = now.head in known.MEDIA or now.head in known.GATHERINGS or not now.words
    if (
        now.words == ["there"]
        and mark.word in known.IS
        or mark.word in known.INTRODUCING
        and is_introduction
        and (now.words or mark.word not in ("of", "with"))
    ):
        _introduce(now)
    elif mark.word == "of" and now.words:
        now.is_of, now.end = True, mark.end
    elif not now.words and mark.word in known.IS:
        now.begin = -1
    else:
        now.is_said = not now.words
        now.marker, now.is_clause = mark.word, mark.word in known.IS
        now.end = mark.begin if now.is_said else now.end


def _introduce(now: Segment) -> None:
    if now.name is not None:
        now.styles.append(now.name)
    now.styles += now.others
    now.others = []
    now.name, now.words, now.head, now.begin, now.is_determined = None, [], "", -1, False
    now.marker, now.has_object, now.object, now.object_is_determined = "", False, "", False
    now.is_clause, now.is_of = False, False
    now.is_said, now.is_introduced = False, True


def _add_to_what_is_said(now: Segment, mark: Mark, before: Mark) -> None:
    if mark.kind == DETERMINER:
        now.object_is_determined = True
    elif mark.kind in (NAME, WORD):
        _add_object(now, mark, before)
    elif mark.kind == MARKER:
        if mark.word == "of" and now.head in known.MEDIA and before.word in known.MEDIA:
            _introduce(now)  # "a painting in ink style of"
        elif mark.word in known.CLAUSES - known.RELATIVES:  # "where clocks and watches melt"
            now.marker, now.has_object, now.object_is_determined = mark.word, False, False
        elif not now.has_object and (now.marker in known.IS or (now.marker in known.POSTURES and mark.word in known.HAVING)):
            now.marker = mark.word  # "standing in a suit"


def _add_object(now: Segment, mark: Mark, before: Mark) -> None:
    is_scenery = mark.word in known.MEDIA or mark.word in known.SETTINGS
    if mark.match is not None:
        is_style = is_scenery or (before.word in ("in", "by") and mark.word not in known.GARMENTS)  # "in ink"
        (now.styles if is_style else now.others).append(mark.match)
    elif before.match is not None:  # "in zwx style", "in zwx dress"
        now.others, now.styles = (
            [match for match in matches if match is not before.match] for matches in (now.others, now.styles)
        )
        (now.styles if is_scenery else now.others).append(before.match)
    if not mark.word.endswith("ly"):
        now.has_object, now.object = True, mark.word
    if mark.word in ("background", "distance", "foreground") and now.marker == "in":
        now.is_behind = True
