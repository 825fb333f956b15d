"""What a prompt says: where experts' words are in it, which things it lists, and the prompt of each thing alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mole_diffusers.binding import vocabulary as known
from mole_diffusers.binding.finding import Match, Phrases, Span, Tokens, by_expert
from mole_diffusers.binding.listing import Listing, listing
from mole_diffusers.binding.segments import Segment

OPENING, CLOSING = "([{", ")]}"
WEIGHT = re.compile(r"\s*:\s*[\d.]+\s*")
CLOSED = re.compile(rf"(?:{WEIGHT.pattern})?\s*[{re.escape(CLOSING)}]")  # the end of a bracket, and its weight
AROUND = " \t\r\n,;:"  # what a prompt neither begins nor ends with
BETWEEN_SIDES = re.compile(r"\s*[,:]?")


@dataclass(frozen=True)
class Mention:
    """A thing that has a place of its own.

    Attributes:
        name: its words in the text.
        spans: where its words are, and those of what it wears or holds.
        experts: the experts whose words name it; none for a noun of nobody.
        phrases: the indices of these words among the phrases of the first expert.
        worn: the experts whose words say what it wears or holds.
    """

    name: str
    spans: tuple[Span, ...]
    experts: tuple[int, ...] = ()
    phrases: tuple[int, ...] = ()
    worn: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """A prompt made of `pieces` of another prompt."""

    text: str
    pieces: tuple[Span, ...]

    @property
    def source(self) -> list[int]:
        """The place of each character in the other prompt."""
        return [i for piece in self.pieces for i in range(*piece)]

    def has(self, place: int) -> bool:
        """Whether it has the character at this place of the other prompt."""
        return any(begin <= place < end for begin, end in self.pieces)


@dataclass(frozen=True)
class Sentence:
    """A text as binding reads it.

    Attributes:
        words: [N], where each expert's words are, and the index of that phrase.
        things: those that the text lists side by side, in the order of naming, and those with a region that a user gave.
        relations: (first thing, second thing, "x" or "y"): the first has the smaller coordinate.
        parts: the prompt of each listed thing alone, in their order.
        why_no_places, why_no_tiles: "" if things have places, or may be drawn apart.
        styles: the experts whose words name a style, a medium or a setting wherever they stand.
    """

    text: str
    words: tuple[Mapping[Span, int], ...]
    things: tuple[Mention, ...] = ()
    relations: tuple[tuple[int, int, str], ...] = ()
    parts: tuple[Part, ...] = ()
    why_no_places: str = ""
    why_no_tiles: str = ""
    styles: frozenset[int] = frozenset()

    @property
    def mentioned(self) -> tuple[bool, ...]:
        """[N]: whether the text has words of this expert."""
        return tuple(map(bool, self.words))


class Who(NamedTuple):
    """What a text is read for.

    Attributes:
        acting: the experts that act; None for all. Words of others are nobody's.
        given: the experts with a region that a user gave. All words of one of them name one thing.
        everywhere: the experts that a user wants in the whole picture.
    """

    acting: Collection[int] | None = None
    given: Collection[int] = ()
    everywhere: Collection[int] = ()


ALL = Who()


def parse(text: str, phrases: Sequence[Sequence[str]], who: Who = ALL) -> Sentence:
    """Read a text. `phrases` [N] are each expert's words; empty for an expert that has none."""
    count, (_, given, everywhere) = len(phrases), who
    acting = range(count) if who.acting is None else who.acting
    tokens = Tokens(text)
    matches = Phrases(phrases).find(tokens.words)
    words = by_expert(tokens, matches, count)
    acted = [
        Match(m.begin, m.end, tuple(dict.fromkeys((k, 0 if k in given else i) for k, i in m.of if k in acting)))
        for m in matches
        if any(k in acting for k, _ in m.of)
    ]
    listed = listing(tokens, acted, everywhere)
    things = [_mention(tokens, item, words) for item in listed.items]
    things = _with_all_words(tokens, listed, things, words)
    placed = {k for thing in things for k in thing.experts}
    for k in given:
        if k in acting and words[k] and k not in placed:
            spans = tuple(words[k])
            things.append(Mention(text[slice(*spans[0])].lower(), spans, (k,), (0,)))
    parts, why = (_parts(tokens, listed, things, words, acting)) if listed.items else ((), listed.why)
    styled = set(listed.styles)
    styles = {k for k in acting if words[k] and all(m in styled for m in acted if any(k == j for j, _ in m.of))}
    return Sentence(
        text, words, tuple(things), listed.relations, parts, "" if things else listed.why, why, frozenset(styles)
    )


def _mention(tokens: Tokens, item: Segment, words: Sequence[Mapping[Span, int]]) -> Mention:
    if item.noun.name is None:
        span = tokens.span(item.noun.begin, item.noun.end)
        first = next(i for i in range(item.noun.begin, item.noun.end) if tokens.words[i] not in known.DETERMINERS)
        noun = tokens.span(first, item.noun.end)
        return Mention(tokens.text[slice(*noun)].lower(), (noun if noun[0] < span[1] else span,))
    span = tokens.span(item.noun.name.begin, item.noun.name.end)
    experts = tuple(dict.fromkeys(k for k, _ in item.noun.name.of))
    return Mention(
        tokens.text[slice(*span)].lower(), (span,), experts, tuple(i for k, i in item.noun.name.of if k == experts[0])
    )


def _with_all_words(
    tokens: Tokens, listed: Listing, things: list[Mention], words: Sequence[Mapping[Span, int]]
) -> list[Mention]:
    """The things with all words of their experts, and with the experts of what they wear."""
    alone = {k for t in things for k in t.experts if sum(k in other.experts for other in things) == 1}
    owners = {k for t in things for k in t.experts}
    last = len(things) - 1
    keeps = bool(things) and _keep_their_own(listed.items)
    found = []
    for i, (thing, item) in enumerate(zip(things, listed.items, strict=True)):
        stop = item.stop if i < last or keeps else item.noun.end
        begin, end = tokens.span(item.noun.begin, stop)
        worn = [
            k
            for k in dict.fromkeys(k for match in item.others for k, _ in match.of)
            if k not in owners and words[k] and all(begin <= a and b <= end for a, b in words[k])
        ]
        spans = dict.fromkeys(thing.spans)
        for k in (*thing.experts, *worn):
            spans |= dict.fromkeys(s for s, p in words[k].items() if k in alone or k in worn or p in thing.phrases)
        found.append(Mention(thing.name, tuple(sorted(spans)), thing.experts, thing.phrases, tuple(worn)))
    return found


def _keep_their_own(items: Sequence[Segment]) -> bool:
    """Whether each item keeps what is said of it; otherwise what is said after the last one is said of all."""
    return any(
        item.said.marker and (item.said.has_object or following.joint != "beside")
        for item, following in zip(items, items[1:], strict=False)
    )


# ---- prompts of single things


def _parts(
    tokens: Tokens,
    listed: Listing,
    things: Sequence[Mention],
    words: Sequence[Mapping[Span, int]],
    acting: Collection[int],
) -> tuple[tuple[Part, ...], str]:
    """Each listed thing's prompt: what stands before the list, its own phrase, and what follows. And why no tiles."""
    items, text = listed.items, tokens.text
    keeps, last = _keep_their_own(items), len(items) - 1
    own = [
        _with_brackets(text, *tokens.span(i.noun.begin, i.stop if n < last or keeps else i.noun.end))
        for n, i in enumerate(items)
    ]
    hidden = [_with_comma(text, begin, end) for begin, end in listed.sides]
    parts = tuple(_part(text, own[0][0], span, own[-1][1], hidden) for span in own)
    why = _why_together(tokens, listed, own) or _why_unparted(parts, things, [words[k] for k in acting], last + 1)
    return parts, why


def _part(text: str, start: int, span: Span, rest: int, hidden: Sequence[Span]) -> Part:
    """What stands before the list, one thing's phrase, and what follows the list, without words for sides."""
    pieces = list[Span]()
    for begin, end in ((0, start), span, (rest, len(text))):
        for a, b in hidden:
            if begin < b and a < end:
                pieces.append((begin, max(begin, a)))
                begin = min(end, b)
        pieces.append((begin, end))
    pieces = [piece for piece in pieces if piece[0] < piece[1]]
    while pieces and not text[slice(*pieces[0])].lstrip(AROUND):
        pieces.pop(0)
    while pieces and not text[slice(*pieces[-1])].rstrip(AROUND):
        pieces.pop()
    if pieces:
        (begin, end), (first, last) = pieces[0], pieces[-1]
        pieces[0] = end - len(text[begin:end].lstrip(AROUND)), end
        first = pieces[-1][0]
        pieces[-1] = first, first + len(text[first:last].rstrip(AROUND))
    return Part("".join(text[slice(*piece)] for piece in pieces), tuple(pieces))


def _with_brackets(text: str, begin: int, end: int) -> Span:
    """A piece of text with the brackets and weights that belong to it."""
    unclosed = 0
    for letter in text[begin:end]:
        unclosed = unclosed + 1 if letter in OPENING else max(0, unclosed - 1) if letter in CLOSING else unclosed
    while (closed := CLOSED.match(text, end)) and (unclosed or text[begin - 1 : begin] in tuple(OPENING)):
        begin, unclosed = (begin, unclosed - 1) if unclosed else (begin - 1, 0)
        end = closed.end()
    return begin, end


def _with_comma(text: str, begin: int, end: int) -> Span:
    """The words for a side, with the space before them, or with the comma after them if they begin a clause."""
    start = begin
    while start and text[start - 1].isspace():
        start -= 1
    if not start or text[start - 1] in ",;:.(":
        return begin, BETWEEN_SIDES.match(text, end).end()  # type: ignore[union-attr]
    return start, end


def _why_together(tokens: Tokens, listed: Listing, own: Sequence[Span]) -> str:
    """Why things cannot be drawn apart: what the text says of several of them."""
    if listed.items[0].joint in ("and", "or"):  # "strong and brave sks man and xyz woman"
        return "it is not clear where the list begins"
    words, heads = tokens.words, {f"{item.noun.head}s" for item in listed.items}
    for i, word in enumerate(words):
        after = words[i + 1 : i + 4]
        if contact := _contact(word, after):
            return f"the prompt says {contact!r}, which two do together"
        if word in known.GROUPS or [word, *after[:1]] in (["each", "other"], ["one", "another"]):
            return f"the prompt speaks of several together: {word!r}"
        if counted := _counted(word, after, heads):
            begin, end = tokens.spans[i]
            if not any(a <= begin and end <= b for a, b in own):
                return f"the prompt counts several: {counted!r}"
    return ""


def _contact(word: str, after: Sequence[str]) -> str:
    """What two do together: "hugging", "holding hands", "hand in hand"."""
    if word in known.CONTACT:
        return word
    if word in ("holding", "holds") and after[:1] and after[0] in ("hands", "each"):
        return f"{word} {after[0]}"
    is_twice = list(after[:2]) in (["in", word], ["to", word], ["by", word])
    return " ".join((word, *after[:2])) if is_twice else ""


def _counted(word: str, after: Sequence[str], heads: Collection[str]) -> str:
    """What is counted: "two people", "2girls", "a group"."""
    if word.isdigit() and after[:1] and after[0] in ("girl", "boy", "other"):
        return f"{word}{after[0]}"
    if word in known.SEVERAL and (plural := [each for each in after if each in known.COUNTED or each in heads]):
        return f"{word} {plural[0]}"
    return word if word in ("group", "pair") else ""


def _why_unparted(parts: Sequence[Part], things: Sequence[Mention], words: Sequence[Mapping[Span, int]], listed: int) -> str:
    """Words of a thing must stand in no other thing's prompt, and every expert's words in some prompt."""
    for i in range(listed):
        if any(parts[j].has(begin) for begin, _ in things[i].spans for j in range(listed) if i != j):
            return f"the prompt speaks of {things[i].name!r} again outside of the list"
    if any(not any(part.has(begin) for part in parts) for each in words for begin, _ in each):
        return "words of a LoRA stand between the things that are listed"
    return ""
