"""The subjects that a prompt lists side by side: "a fox and an owl", "a fox, a lemon and an owl", "a fox next to an owl".

Neighbouring segments of a sentence make a list if each clearly names a subject. What is unclear makes none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mole_diffusers.binding import vocabulary as known
from mole_diffusers.binding.contact import Touch, touching
from mole_diffusers.binding.finding import Match, Span, Tokens
from mole_diffusers.binding.layout import MOST_SUBJECTS
from mole_diffusers.binding.marking import MARKER, SIDE, kind, marked, quoted, sentences
from mole_diffusers.binding.segments import NounPhrase, Segment, segments_of

CLOSING = ("and", ", and", "beside")  # joints of which a list has one
NOSUBJECT_LISTED = "the prompt lists it beside no other LoRA's subject"
UNCLEAR = "the prompt does not say clearly who stands beside whom"
TOO_MANY = "the prompt lists more subjects than can have places"
TWO_LISTS = "the prompt has several lists"
FRAMED = re.compile(  # "Four panels. A fox and an owl"
    rf"(?<!\S)(?:{known.one_of(known.FRAMES)}|(?:seamless|repeating) patterns?|before and after"
    r"|(?:double|triple|multiple) exposures?"
    r"|(?:multiple|several|many|various) (?:views|angles|images|photos|pictures|expressions|poses)"
    r"|(?:comic|film|photo) strip|(\d) x \1 grid)(?!\S)"
)
Verdict = Literal["item", "part", "begin", "end", "unclear"]
Rows = tuple[tuple[Verdict, Any], ...]  # the first row that holds decides; its example is for LoRAs of fox, owl and woman
NEAR = known.PREPOSITIONS - known.HAVING
Found = tuple[list[Segment], list[tuple[int, int, str]], list[Segment]]  # items, their relations, their sentence


@dataclass(frozen=True)
class Listing:
    """What a text says of who is where."""

    items: tuple[Segment, ...] = ()  # of its list, from left to right; none if it lists nothing, or if that is unclear
    relations: tuple[tuple[int, int, str], ...] = ()  # (first item, second, axis): the first has the smaller coordinate
    sides: tuple[Span, ...] = ()  # words for a side of the picture, such as "on the left"
    styles: tuple[Match, ...] = ()  # those that name a style, a medium or a setting
    touches: tuple[Touch, ...] = ()  # the subjects that touch
    # the tokens (begin, end) of single subjects in its sentence that may be none of its items
    besides: tuple[Span, ...] = ()
    why: str = ""  # why there is no list


def listing(tokens: Tokens, matches: Sequence[Match], placeless: Collection[int] = ()) -> Listing:
    """The list of a text's subjects. Experts in `placeless` act in the whole picture, so their words name no subject."""
    is_framed = FRAMED.search(" ".join(tokens.words)) is not None
    sides, styles, touches, why = list[Span](), list[Match](), list[Touch](), NOSUBJECT_LISTED
    found, tags = list[Found](), list[Found]()
    sided = list[Segment]()  # "On the left, a fox. An owl is on the right." has two
    quotes = dict(quoted(tokens.words))
    placed = [
        match
        for match in matches
        if not set(match.experts) <= set(placeless) and quotes.get(match.begin, match.end) == match.end
    ]
    for begin, end, named in sentences(tokens, placed):
        marks = marked(tokens, begin, end, named)
        sides += [tokens.span(mark.begin, mark.end) for mark in marks if mark.kind == SIDE]
        segments = segments_of(marks)
        styles += (style for segment in segments for style in segment.all_styles)
        if is_framed or not known.IN_FRAMES.isdisjoint(tokens.words[begin:end]):  # "a character sheet of a fox and an owl"
            why = UNCLEAR
            continue
        touches += touching(tokens, marks)
        for run in _runs(segments) if sum(s.is_subject for s in segments) > 1 else ():
            is_closed = any(item.joint in CLOSING for item in run[1:])
            items = _kept(run) if is_closed else _tags(run)
            if items and (objection := _objection(items, run[: run.index(items[0])], tokens.words)):
                why = objection
            elif items:
                relations = list(dict.fromkeys([*_relations(items), *_side_relations(items)]))
                (found if is_closed else tags).append((items, relations, segments))
        here = [s for s in segments if s.side and s.is_subject and not s.is_introduced]
        if len(here) == 1 and (marks[0].kind == SIDE or here[0].said.marker not in known.HOLDING):
            sided += here
    found = found or tags
    if not found and len({segment.side for segment in sided}) == len(_names(sided)) == len(sided) > 1:
        found = [(sided, list(_side_relations(sided)), sided)]
    items, relations, segments = max(found, key=lambda each: len(each[0]), default=([], [], []))
    longest = _names(items)
    if any(not _names(each) <= longest for each, *_ in found):
        items, relations, why = [], [], TWO_LISTS
    besides = _besides(tokens, items, segments) if items else ()
    return Listing(
        tuple(items), tuple(relations), tuple(sides), tuple(styles), tuple(touches), tuple(besides), "" if items else why
    )


def _besides(tokens: Tokens, items: Sequence[Segment], segments: Sequence[Segment]) -> list[Span]:
    """What names one more subject in the sentence of a list, alone or in what is said of all items: "a fox and an owl with a
    bear", but not "in a dress"; and anything with a side of the picture: "and on the right a lamp".
    """
    found = [
        s.noun.name for s in segments if s.noun.name is not None and s.is_subject and (s.noun.is_determined or s.is_person)
    ]
    if items[-1].said.marker != "made":  # "of clay"
        found += [m for m in items[-1].others if not tokens.words[m.end - 1].endswith("s")]
    others = [s for s in segments if s.side and s.noun.words and not s.is_said and not any(s is item for item in items)]
    sided = [(s.noun.begin, s.noun.end) for s in others if s.noun.name is None]  # "left: day, right: night"
    return [(m.begin, m.end) for m in found if tokens.words[m.end - 1] not in known.GARMENTS] + sided


def _names(items: Sequence[Segment]) -> set[Any]:
    return set(map(_name, items))


def _name(item: Segment) -> Any:
    return item.noun.name.of if item.noun.name is not None else item.noun.head


def _runs(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Neighbouring segments that may be items of one list. What is said of an item becomes part of it."""
    run: list[Segment] = []
    after_comma = False  # whether a comma has ended what is said of the last item
    is_closed = False  # whether the run has an "and", or the like
    for segment in segments:
        if segment.joint == "," and run and run[-1].side and segment.side:
            segment.joint = "and"
        verdict = _verdict(run[-1], segment, is_closed, after_comma) if run else "begin"
        if verdict in ("part", "end") and segment.is_said and segment.joint == ",":
            run[-1].said.is_aside = True
        if verdict == "part":
            run[-1].absorb(segment)
            after_comma = after_comma if not segment.is_said else segment.joint == ","
            continue
        after_comma = False
        if verdict == "item":
            run.append(segment)
            is_closed = is_closed or segment.joint in CLOSING
            continue
        if verdict != "unclear":
            yield run
        run, is_closed = [segment] if verdict == "begin" else [], False
    yield run


def _verdict(last: Segment, segment: Segment, is_closed: bool, after_comma: bool) -> Verdict:
    """What a segment is: an "item" of the run that ends with `last`, a "part" of that item, or the "begin" of another run.

    It may also "end" the run without being a part of any, or make the whole run "unclear".
    """
    joint = segment.joint
    if segment.is_introduced or joint in ("", "or"):
        return "begin"
    if segment.is_said:
        return "end" if joint == "," and is_closed else "part"
    if joint == ",":
        return "begin" if is_closed else "item"
    if joint == ", and" and is_closed and not segment.is_subject:
        return "begin"
    verdict: Verdict = "item"
    if joint == ", and" and last.said.is_clause and not after_comma:
        verdict = "item" if segment.is_person else "unclear"
    elif (last.said.marker or last.noun.is_of) and joint != ", and" and not after_comma:
        verdict = _after_beside(last, segment) if joint == "beside" else _after_and(last, segment)
    return "end" if verdict == "unclear" and is_closed else verdict


def _after_and(item: Segment, new: Segment) -> Verdict:
    """What "and" adds after what is said of an item: another item, a part of what is said, or something unclear."""
    marker, have_article = item.said.marker, item.noun.is_determined or new.noun.is_determined
    is_clause = marker in known.CLAUSES - known.RELATIVES or (item.noun.is_of and not marker)
    takes_subjects = marker in known.TWO_PARTY | known.HOLDING or marker not in known.HAVING  # besides clothes and settings
    new_has_predicate = kind(new.said.marker) == MARKER and new.said.marker not in NEAR
    rows: Rows = (
        ("part", not item.is_subject),  # "a lemon in a hat and a fox and an owl"
        ("part", new.noun.name is None or new.is_scenery),  # "a fox with a cup and a spoon and an owl"
        ("part", new.is_clothing or new.noun.is_mixed),  # "a fox with a cup and an owl hat"
        ("item", is_clause and new.is_person),  # "a fox where dogs bark and a woman"
        ("unclear", is_clause),  # "a fox where dogs bark and an owl"
        ("item", not item.said.has_object),  # "a fox smiling and an owl"
        # "a fox with cups and owl"
        ("unclear", item.noun.is_determined and not (item.said.object_is_determined or new.noun.is_determined)),
        ("item", new.is_person and marker not in known.TWO_PARTY),  # "a fox with a cup and a woman"
        ("item", new.said.marker == marker and not item.others),  # "a fox on a rug and an owl on a chair"
        # "a fox with a cup and an owl with a hat"
        ("item", new_has_predicate and not (takes_subjects and item.others)),
        ("unclear", takes_subjects and (item.others or marker in known.TWO_PARTY | NEAR)),  # "a fox near a tree and an owl"
        ("unclear", item.others and not have_article and (item.is_person or item.said.object not in known.GARMENTS)),
        ("item", marker not in known.WEARING and item.said.object in known.GARMENTS),  # "a fox in a hat and an owl"
        ("item", marker not in known.WEARING and not takes_subjects),  # "a fox in a garden and an owl"
        ("item", item.said.object_is_determined and not have_article),  # "fox with a cup and owl"
        ("unclear", True),  # "a fox with a cup and an owl"
    )
    return _first(rows)


def _after_beside(item: Segment, new: Segment) -> Verdict:
    """The same for words such as "next to"."""
    is_vertical = new.relation is not None and new.relation[0] == "y"
    rows: Rows = (
        ("part", not item.is_subject),  # "a lemon in a hat next to a fox and an owl"
        # "a fox waving next to an owl"
        ("unclear", item.said.marker not in known.HAVING and (item.others or item.said.marker in known.TWO_PARTY)),
        ("unclear", is_vertical and item.said.has_object),  # "a fox holding a cup above an owl"
        ("item", new.is_subject or new.is_noun),  # "a fox sitting next to an owl"
        ("part", True),  # "a fox sitting next to a beach and an owl"
    )
    return _first(rows)


def _first(rows: Rows) -> Verdict:
    return next(verdict for verdict, holds in rows if holds)


def _kept(run: Sequence[Segment]) -> list[Segment]:
    """The items of a run that are listed: those before its last "and" that name subjects; none if fewer than two do."""
    items = list(run)
    if len(subjects := [item for item in items if item.is_subject]) < 2:
        return []
    while items and items[-1].joint == ",":
        items.pop()
    while items and not (items[-1].is_subject or _is_member(items[-1], subjects, is_last=True)):
        items.pop()
    kept: list[Segment] = []
    for item in reversed(items):
        if not (item.is_subject or _is_member(item, subjects, is_last=not kept)):
            break
        kept.insert(0, item)
    while len(kept) > 2 and kept[1].joint == "," and not (kept[0].noun.is_determined or kept[0].is_person):
        if not all(item.noun.is_determined for item in kept[1:]):  # as they are in "ink, a fox and an owl"
            break
        kept.pop(0)
    is_closed = any(item.joint in CLOSING for item in kept[1:])
    once: dict[Any, Segment] = {}
    for item in kept:
        once.setdefault(_name(item), item)
    return list(once.values()) if is_closed and sum(item.is_subject for item in once.values()) > 1 else []


def _tags(run: Sequence[Segment]) -> list[Segment]:
    """The items of a run without an "and": "a fox, an owl, night" has two. Each is a whole tag, with an article."""
    subjects = [i for i, item in enumerate(run) if item.is_subject and item.noun.is_bare]
    items = list(run[subjects[0] : subjects[-1] + 1]) if subjects else []
    is_list = all(item.noun.is_bare and not item.is_clothing and (item.is_subject or item.is_noun) for item in items)
    return items if is_list and len(set(map(_name, (run[i] for i in subjects)))) == len(subjects) > 1 else []


def _objection(items: Sequence[Segment], before: Sequence[Segment], words: Sequence[str]) -> str:
    """Why items have no places, although they are listed; "" if they have. `words` are the text's."""
    if len(items) > MOST_SUBJECTS:
        return TOO_MANY
    has = known.WEARING | known.HOLDING
    if any(item.noun.is_of and item.others for item in before):  # "a sheet of foxes, owls and women"
        return UNCLEAR
    if any(not known.NOT.isdisjoint(words[max(m.begin - 2, 0) : m.begin]) for item in items for m in item.others):
        return UNCLEAR  # "a fox without an owl and a woman"
    if words[max(items[-1].stop - 1, 0)] == "it" and items[-1].said.marker in NEAR:  # "and an owl behind it"
        return UNCLEAR
    if not items[0].is_person and any(item.said.marker in has for item in before):  # "wearing goggles, a shirt and a jacket"
        return UNCLEAR
    bare = {item.noun.head for item in items if not item.noun.is_determined}
    clothes = [item.is_clothing or (item.noun.head in bare & known.HELD_SUBJECTS) for item in items]
    if any(clothes) and not all(clothes):  # "sks knight, sword and shield"
        return UNCLEAR
    # "sks woman, jeans and top"
    if bare & known.BODY or (bare & known.GARMENTS and any(item.is_subject for item in before)):
        return UNCLEAR
    is_unclear = _is_style(items[0].noun, items[1:]) or _share_a_head(items[-2].noun, items[-1])
    return UNCLEAR if is_unclear else ""


def _is_style(first: NounPhrase, others: Sequence[Segment]) -> bool:
    """Whether a list may begin with the trigger of a style: "zwxart, sks woman and xyz man"."""
    is_word = first.end - first.begin == 1 and others[0].joint == ","
    return is_word and all(item.is_person and item.noun.end - item.noun.begin > 1 for item in others)


def _share_a_head(noun: NounPhrase, item: Segment) -> bool:
    """Whether both may say what the last word names: "fox and owl characters", "a strawberry and chocolate cake"."""
    last = item.noun
    if noun.name is None or last.name is None or item.joint == "beside":
        return False
    if last.is_determined:  # "a fox and an owl chess set"
        is_shared = last.head in known.SHARED
    else:
        is_shared = last.head.endswith("s") or {noun.head, last.head}.isdisjoint(known.PERSONS | known.NOT | known.GROUPS)
    return noun.end == noun.name.end and last.end > last.name.end and is_shared


def _is_member(item: Segment, subjects: Sequence[Segment], *, is_last: bool) -> bool:
    """Whether a noun of nobody counts in a list of subjects.

    As the last one it needs an article. Before others it has one if they have, and a list does not begin with it otherwise.
    """
    if not item.is_noun or item.is_clothing or known.QUALITIES.issuperset(item.noun.words):
        return False
    if is_last:
        return item.noun.is_determined and not item.said.is_behind
    if item.said.marker:
        return False
    if item.noun.is_determined:
        return any(subject.noun.is_determined for subject in subjects)
    return item.joint == "," and len(item.noun.words) < 3 and not subjects[0].noun.begin > item.noun.begin


def _relations(items: Sequence[Segment]) -> Iterator[tuple[int, int, str]]:
    for i, item in enumerate(items[1:]):
        if item.joint == "beside" and item.relation is not None:
            axis, first_is_smaller = item.relation
            yield (i, i + 1, axis) if first_is_smaller else (i + 1, i, axis)


def _side_relations(items: Sequence[Segment]) -> Iterator[tuple[int, int, str]]:
    """A subject on the left is left of subjects on the right and of subjects without a side."""
    for i, item in enumerate(items):
        for j, other in enumerate(items):
            if i != j and item.side is not None:
                axis, is_first = item.side
                if other.side is None or other.side == (axis, not is_first):
                    yield (i, j, axis) if is_first else (j, i, axis)
