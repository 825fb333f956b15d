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
class NounPhrase:
    """The words that name a subject."""

    begin: int = -1  # among the text's tokens; -1 before its first word
    end: int = -1
    name: Match | None = None  # what names the subject; None if no expert's words do
    words: list[str] = field(default_factory=list)  # without articles
    is_determined: bool = False  # by an article or the like
    is_mixed: bool = False  # of several experts' words, or with a "no"
    is_of: bool = False  # "a piece of fruit"
    is_bare: bool = False  # an article and a noun, of which nothing is said before the next comma, "and" or the like

    @property
    def head(self) -> str:
        """Its last word."""
        return self.words[-1] if self.words else ""


@dataclass(slots=True)
class Predicate:
    """What is said of a subject."""

    marker: str = ""  # the verb or preposition that it begins with; "" if nothing is said
    has_object: bool = False  # "holding a cup", not "smiling"
    object: str = ""  # its last word
    object_is_determined: bool = False
    is_clause: bool = False  # a sentence of its own: "a fox is in a tree"
    is_behind: bool = False  # "in the background"
    is_aside: bool = False  # after a comma: "a fox, sitting"


@dataclass(slots=True)
class Segment:
    """A part of a sentence between commas, "and" and the like."""

    joint: str = ""  # what joins it to the segment before: "", ",", "and", ", and", "beside" or "or"
    relation: Side | None = None  # of a "beside": the axis, and whether the segment before has the smaller coordinate
    noun: NounPhrase = field(default_factory=NounPhrase)
    said: Predicate = field(default_factory=Predicate)
    stop: int = -1  # where what is said ends, among the text's tokens
    others: list[Match] = field(default_factory=list)  # what it wears, or holds
    styles: list[Match] = field(default_factory=list)  # before it: "ink" in "ink drawing of a fox"
    side: Side | None = None  # "on the left"
    is_said: bool = False  # all of it is said of what precedes: "holding a cup"
    is_introduced: bool = False  # a medium precedes: "a photo of a fox"

    @property
    def is_scenery(self) -> bool:
        return known.is_scenery(self.noun.head) or self.said.is_behind

    @property
    def is_subject(self) -> bool:
        """Whether it names a subject of an expert."""
        if self.noun.name is None or self.is_said or self.noun.is_mixed or self.is_scenery:
            return False
        is_adjective = self.noun.end > self.noun.name.end and self.noun.head in known.ADJECTIVES
        return not is_adjective and not known.QUALITIES.issuperset(self.noun.words)  # "fox red", "cat earrings"

    @property
    def is_noun(self) -> bool:
        """Whether it names a subject of nobody: "a lemon"."""
        plain = self.noun.name is None and 0 < len(self.noun.words) <= 4 and not self.noun.is_of
        return plain and not (self.is_said or self.noun.is_mixed or self.is_scenery)

    @property
    def all_styles(self) -> list[Match]:
        """What names a style, a medium or a setting in it."""
        return [*self.styles, self.noun.name] if self.noun.name is not None and self.is_scenery else self.styles

    def absorb(self, part: Segment) -> None:
        """Make another segment a part of what is said of this one."""
        self.others += [*part.others, *([part.noun.name] if part.noun.name is not None and not part.is_scenery else [])]
        self.styles += part.styles
        self.said.marker = part.said.marker or self.said.marker or part.joint
        self.said.has_object = self.said.has_object or part.said.has_object or not part.is_said
        if part.said.has_object or part.noun.head:
            self.said.object = part.said.object or part.noun.head
            self.said.object_is_determined = part.said.object_is_determined or part.noun.is_determined
        self.stop, self.side = max(self.stop, part.stop), self.side or part.side
        self.said.is_behind = self.said.is_behind or part.said.is_behind

    @property
    def is_clothing(self) -> bool:
        return self.noun.head in known.GARMENTS

    @property
    def is_person(self) -> bool:
        return self.noun.head in known.PERSONS


def segments_of(marks: Sequence[Mark]) -> list[Segment]:
    """The segments of a sentence."""
    segments, now, joint = list[Segment](), Segment(), ""
    for n, mark in enumerate(marks):
        is_empty = now.noun.begin < 0 and not now.is_said
        if mark.kind == SIDE and mark.word in known.IS and is_empty and segments:  # "a fox, in a hat, stands on the left"
            next((s for s in reversed(segments) if not s.is_said), segments[-1]).side = mark.relation
            continue
        if mark.kind not in JOINTS or _joins_qualities(now, marks, n):
            _add(now, marks, n)
            continue
        side = now.side
        if not is_empty:
            segments.append(now)
            joint, side = JOINTS[mark.kind], None
        elif joint and mark.kind != COMMA:
            joint = ", and" if (joint, mark.kind) == (",", AND) else JOINTS[mark.kind]
        now = Segment(joint if segments else "", side=side, relation=mark.relation)
    if now.noun.begin >= 0 or now.is_said:
        segments.append(now)
    for segment in segments:
        segment.noun.is_bare = segment.noun.is_determined and not (segment.said.marker or segment.noun.is_of)
    return segments


def _joins_qualities(now: Segment, marks: Sequence[Mark], n: int) -> bool:
    """Whether an "and" stands between adjectives, as in "a black and white cat"."""
    if marks[n].kind != AND or now.noun.name is not None or now.said.marker or not now.noun.words or n + 1 == len(marks):
        return False
    return known.QUALITIES.issuperset(now.noun.words) and marks[n + 1].kind in (WORD, NAME)


def _add(now: Segment, marks: Sequence[Mark], n: int) -> None:
    """Add one word to the segment that it stands in."""
    mark = marks[n]
    if mark.kind == SIDE:
        now.side = mark.relation
        return
    if now.noun.begin < 0 and not (mark.kind == MARKER and mark.word in known.INTRODUCING):
        now.noun.begin = mark.begin
    now.stop = mark.end
    if now.said.marker or now.is_said:
        _add_to_what_is_said(now, mark, marks[n - 1])
    elif _ends_noun_phrase(now, marks, n):
        _end_noun_phrase(now, mark)
    elif now.noun.is_of:
        now.noun.end = mark.end
        now.noun.is_mixed = now.noun.is_mixed or (now.noun.name is not None and mark.match is not None)  # "zwxart of a fox"
        now.others += [] if mark.match is None else [mark.match]
    else:
        _add_to_noun_phrase(now, mark, marks[n - 1] if n else None)


def _add_to_noun_phrase(now: Segment, mark: Mark, before: Mark | None) -> None:
    if mark.kind == DETERMINER and (now.noun.words or now.noun.name is not None):  # "holds a cup"
        now.said.marker, now.said.has_object, now.said.object_is_determined = mark.word, True, True
        now.is_said = now.noun.name is None and not now.noun.is_determined
        return
    now.noun.end = mark.end
    if mark.kind == DETERMINER:
        now.noun.is_determined = True
    elif mark.kind == POSSESSIVE:
        if now.noun.name is not None:  # "sks man's dog" is no subject of the expert
            now.others.append(now.noun.name)
            now.noun.name, now.noun.is_determined = None, True
    else:
        if mark.match is not None and now.noun.name is not None and set(now.noun.name.experts) != set(mark.match.experts):
            now.noun.is_mixed = now.noun.is_mixed or before is None or before.kind != NAME
            now.others.append(now.noun.name)
            now.noun.name = mark.match
        now.noun.name = now.noun.name or mark.match
        now.noun.is_mixed = now.noun.is_mixed or (mark.word in known.NOT and now.noun.name is None)
        now.noun.words.append(mark.word)


def _ends_noun_phrase(now: Segment, marks: Sequence[Mark], n: int) -> bool:
    is_marker = marks[n].kind == MARKER and not _is_adjective(now, marks, n)
    return is_marker or _is_plural_verb(now, marks, n) or _is_participle(now, marks, n)


def _is_plural_verb(now: Segment, marks: Sequence[Mark], n: int) -> bool:
    """Whether a word says what all subjects of a list do: "a fox and an owl play chess", but not "fox and owl show
    poster".
    """
    if now.joint != "and" or marks[n].kind != WORD or marks[n - 1].kind != NAME or f"{marks[n].word}s" not in known.VERBS:
        return False
    return now.noun.is_determined or now.is_person or n + 1 == len(marks) or marks[n + 1].kind not in (WORD, NAME)


def _is_participle(now: Segment, marks: Sequence[Mark], n: int) -> bool:
    """Whether a word after the name of a subject says what is done to it: "an owl painted on a wall", but not
    "owl-headed".
    """
    if marks[n].kind != WORD or now.noun.name is None or not known.is_participle(marks[n].word):
        return False
    return n + 1 == len(marks) or marks[n + 1].kind not in (WORD, NAME, POSSESSIVE)


def _is_adjective(now: Segment, marks: Sequence[Mark], n: int) -> bool:
    """Whether a word that looks like a verb stands between an article and its noun: "a smiling woman"."""
    mark = marks[n]
    if not mark.word.endswith("ing") or mark.word in known.INTRODUCING:
        return False
    if not now.noun.is_determined or now.noun.name is not None or n + 1 >= len(marks):
        return False
    follows = marks[n + 1].kind in (WORD, NAME)
    return follows and (not now.noun.words or mark.word not in known.VERBS)


def _end_noun_phrase(now: Segment, mark: Mark) -> None:
    """A verb or a preposition ends the noun phrase, unless it only introduces the subject: "a photo of"."""
    is_introduction = now.noun.head in known.MEDIA | known.GATHERINGS or not now.noun.words
    is_introduction = is_introduction or (mark.word in ("depicting", "portraying") and now.noun.name is None)
    if (
        now.noun.words == ["there"]
        and mark.word in known.IS
        or mark.word in known.INTRODUCING
        and is_introduction
        and (now.noun.words or mark.word not in ("of", "with"))
    ):
        _introduce(now)
    elif mark.word == "of" and now.noun.words:
        now.noun.is_of, now.noun.end = True, mark.end
    elif not now.noun.words and mark.word in known.IS:
        now.noun.begin = -1
    else:
        now.is_said = not now.noun.words
        now.said.marker, now.said.is_clause = mark.word, mark.word in known.IS
        now.noun.end = mark.begin if now.is_said else now.noun.end


def _introduce(now: Segment) -> None:
    if now.noun.name is not None:
        now.styles.append(now.noun.name)
    now.styles += now.others
    now.others = []
    now.noun = NounPhrase(end=now.noun.end, is_mixed=now.noun.is_mixed)
    now.said = Predicate(is_behind=now.said.is_behind)
    now.is_said, now.is_introduced = False, True


def _add_to_what_is_said(now: Segment, mark: Mark, before: Mark) -> None:
    if mark.kind == DETERMINER:
        now.said.object_is_determined = True
    elif mark.kind in (NAME, WORD):
        _add_object(now, mark, before)
    elif mark.kind == MARKER:
        if mark.word == "of" and now.noun.head in known.MEDIA and before.word in known.MEDIA:
            _introduce(now)  # "a painting in ink style of"
        elif mark.word in known.CLAUSES - known.RELATIVES:  # "where clocks and watches melt"
            now.said.marker, now.said.has_object, now.said.object_is_determined = mark.word, False, False
        elif not now.said.has_object and (
            now.said.marker in known.IS
            or known.is_participle(now.said.marker)
            or (now.said.marker in known.POSTURES and mark.word in known.HAVING)
        ):
            now.said.marker = mark.word  # "standing in a suit"


def _add_object(now: Segment, mark: Mark, before: Mark) -> None:
    is_scenery = known.is_scenery(mark.word)
    if mark.match is not None:
        is_style = is_scenery or (before.word in ("in", "by") and mark.word not in known.GARMENTS)  # "in ink"
        (now.styles if is_style else now.others).append(mark.match)
    elif before.match is not None:  # "in zwx style", "in zwx dress"
        now.others, now.styles = (
            [match for match in matches if match is not before.match] for matches in (now.others, now.styles)
        )
        (now.styles if is_scenery else now.others).append(before.match)
    if not mark.word.endswith("ly"):
        now.said.has_object, now.said.object = True, mark.word
    if mark.word in ("background", "distance", "foreground") and now.said.marker == "in":
        now.said.is_behind = True
