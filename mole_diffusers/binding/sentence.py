"""What a prompt says: where experts' words are in it, which subjects it lists, and the prompt of each subject alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from mole_diffusers.binding import vocabulary as known
from mole_diffusers.binding.contact import FRONT, OF_BOTH, STACKED
from mole_diffusers.binding.finding import Match, Phrases, Span, Tokens, by_expert
from mole_diffusers.binding.listing import Listing, listing
from mole_diffusers.binding.marking import DETERMINER, WORD, kind
from mole_diffusers.binding.segments import Segment
from mole_diffusers.binding.together import why_not_per_subject, why_together

OPENING, CLOSING = "([{", ")]}"
WEIGHT = re.compile(r"\s*:\s*[\d.]+\s*")
CLOSED = re.compile(rf"(?:{WEIGHT.pattern})?\s*[{re.escape(CLOSING)}]")  # the end of a bracket, and its weight
TAG = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]*>", re.IGNORECASE)  # of other tools, which says nothing here
AROUND = " \t\r\n,;:"  # what a prompt neither begins nor ends with
BETWEEN_SIDES = re.compile(r"\s*[,:]?")


@dataclass(frozen=True)
class Mention:
    """A subject that has a place of its own, or that touches another."""

    name: str  # its words in the text
    spans: tuple[Span, ...]  # where its words are, and those of what it wears or holds
    experts: tuple[int, ...] = ()  # whose words name it; none for a noun of nobody
    phrases: tuple[int, ...] = ()  # the indices of these words among the phrases of the first expert
    attribute_adapters: tuple[int, ...] = ()  # the experts whose words say what it wears or holds


@dataclass(frozen=True)
class Part:
    """A prompt made of pieces of another prompt."""

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
class Contact:
    """Two subjects that touch."""

    subjects: tuple[Mention, Mention]
    relation: str  # what the first does, a key of `contact.FRONT`, whatever words the prompt has for it
    parts: tuple[Part, Part]  # the prompt of each alone, without what the two do
    why_not_per_subject: str = ""  # "" if they may be drawn apart

    @property
    def front(self) -> int:
        """Which of the two is in front, 0 or 1."""
        return FRONT[self.relation]

    @property
    def is_stacked(self) -> bool:
        """Whether the first is above the second; otherwise they stand side by side."""
        return self.relation in STACKED

    def __str__(self) -> str:
        first, second = (repr(subject.name) for subject in self.subjects)
        return f"{first} {self.relation} {second}, with {(first, second)[self.front]} in front"


@dataclass(frozen=True)
class Sentence:
    """A text as binding reads it."""

    text: str
    words: tuple[Mapping[Span, int], ...]  # [N], where each expert's words are, and the index of that phrase
    subjects: tuple[Mention, ...] = ()  # those listed side by side, as they are named, and those with a region from the user
    relations: tuple[tuple[int, int, str], ...] = ()  # (first subject, second, "x" or "y"): the first has the smaller
    parts: tuple[Part, ...] = ()  # the prompt of each listed subject alone
    contacts: tuple[Contact, ...] = ()
    why_no_places: str = ""  # "" if subjects have places
    why_no_tiles: str = ""  # "" if they may be drawn apart
    styles: frozenset[int] = frozenset()  # experts whose words name a style, a medium or a setting wherever they stand

    @property
    def mentioned(self) -> tuple[bool, ...]:
        """[N]: whether the text has words of this expert."""
        return tuple(map(bool, self.words))


class Who(NamedTuple):
    """What a text is read for."""

    acting: Collection[int] | None = None  # the experts that act; None for all. Words of others are nobody's
    given: Collection[int] = ()  # those with a region from the user. All words of one of them name one thing
    everywhere: Collection[int] = ()  # those that a user wants in the whole picture


ALL = Who()


def parse(text: str, phrases: Sequence[Sequence[str]], who: Who = ALL) -> Sentence:
    """Read a text. `phrases` [N] are each expert's words; empty for an expert that has none."""
    count, (_, given, everywhere) = len(phrases), who
    acting = range(count) if who.acting is None else who.acting
    tags = [tag.span() for tag in TAG.finditer(text)]
    tokens = Tokens(TAG.sub(lambda tag: " " * len(tag[0]), text))
    matches = Phrases(phrases).find(tokens.words)
    words = by_expert(tokens, matches, count)
    acted = [
        Match(m.begin, m.end, tuple(dict.fromkeys((k, 0 if k in given else i) for k, i in m.of if k in acting)))
        for m in matches
        if any(k in acting for k, _ in m.of)
    ]
    listed = listing(tokens, acted, everywhere)
    own = _own_phrases(tokens, listed.items)
    subjects = _subjects(tokens, listed.items, own, words)
    own = [_with_brackets(text, *span) for span in own]
    hidden = [*tags, *(_with_comma(text, *span) for span in listed.sides)]
    parts = tuple(_part(text, own[0][0], span, own[-1][1], hidden) for span in own)
    contacts = (*_touching(tokens, listed, phrases, words, tags), *_of_both(tokens, listed, phrases, subjects, own, hidden))
    why = f"the prompt has {contacts[0]}" if contacts and not listed.items else listed.why
    placed = {k for subject in subjects for k in subject.experts}
    for k in given:
        if k in acting and words[k] and k not in placed:
            spans = tuple(words[k])
            subjects.append(Mention(text[slice(*spans[0])].lower(), spans, (k,), (0,)))
    styled = set(listed.styles)
    return Sentence(
        text,
        words,
        tuple(subjects),
        listed.relations,
        parts,
        contacts,
        why_no_places="" if subjects else why,
        why_no_tiles=why
        or why_together(tokens, listed, own, phrases)
        or why_unparted(parts, subjects, [words[k] for k in acting]),
        styles=frozenset(k for k in acting if words[k] and all(m in styled for m in acted if any(k == j for j, _ in m.of))),
    )


def together(sentences: Sequence[Sentence]) -> Sentence:
    """Several texts that a denoiser reads for one picture as one sentence, as `words.joined` and `words.overlaid` read their
    tokens: the longest list counts; none, if another one differs.
    """
    if len(sentences) == 1:
        return sentences[0]
    starts = [0, *accumulate(len(each.text) + 1 for each in sentences)]

    def moved(subject: Mention, by: int) -> Mention:
        return replace(subject, spans=tuple((a + by, b + by) for a, b in subject.spans))

    words: list[dict[Span, int]] = [{} for _ in sentences[0].words]
    for sentence, start in zip(sentences, starts, strict=False):
        for own, found in zip(words, sentence.words, strict=True):
            own |= {(a + start, b + start): phrase for (a, b), phrase in found.items()}
    at = max(range(len(sentences)), key=lambda i: len(sentences[i].subjects))
    longest, experts = sentences[at], {subject.experts for subject in sentences[at].subjects}
    differ = any(t.experts not in experts for each in sentences for t in each.subjects if t.experts)
    silent = [each.why_no_places for each in sentences if each.why_no_places]
    return Sentence(
        "\n".join(each.text for each in sentences),
        tuple(words),
        () if differ else tuple(moved(subject, starts[at]) for subject in longest.subjects),
        contacts=tuple(dict.fromkeys(contact for each in sentences for contact in each.contacts)),
        why_no_places="the texts that are read list different subjects" if differ else "" if experts else silent[0],
        why_no_tiles="several texts are read",
        styles=frozenset(
            k for k in range(len(words)) if words[k] and all(k in each.styles or not each.words[k] for each in sentences)
        ),
    )


def _own_phrases(tokens: Tokens, items: Sequence[Segment]) -> list[Span]:
    """Where each item stands, with what is said of it. What is said after the last one is said of all, unless each keeps
    its own.
    """
    # "an owl on the right and a bear in the middle"
    keeps = any(item.side for item in items) and items[-1].said.object in known.MIDDLE
    keeps = keeps or any(
        item.said.marker and (item.said.has_object or following.joint != "beside")
        for item, following in zip(items, items[1:], strict=False)
    )
    return [tokens.span(i.noun.begin, i.stop if keeps or i is not items[-1] else i.noun.end) for i in items]


def _subjects(
    tokens: Tokens, items: Sequence[Segment], own: Sequence[Span], words: Sequence[Mapping[Span, int]]
) -> list[Mention]:
    """The subjects that are listed, with all words of their experts, and with the experts of what they wear."""
    named = [_named(tokens, item.noun.name) if item.noun.name else _noun(tokens, item) for item in items]
    owners = [k for subject in named for k in subject.experts]
    found = []
    for subject, item, (begin, end) in zip(named, items, own, strict=True):
        attribute_adapters = [
            k
            for k in dict.fromkeys(k for match in item.others for k in match.experts)
            if k not in owners and words[k] and all(begin <= a and b <= end for a, b in words[k])
        ]
        spans = dict.fromkeys(subject.spans)
        for k in (*subject.experts, *attribute_adapters):
            spans |= dict.fromkeys(s for s, p in words[k].items() if owners.count(k) < 2 or p in subject.phrases)
        found.append(replace(subject, spans=tuple(sorted(spans)), attribute_adapters=tuple(attribute_adapters)))
    return found


def _named(tokens: Tokens, match: Match) -> Mention:
    """The subject that an expert's words name."""
    span, first = tokens.span(match.begin, match.end), match.of[0][0]
    phrases = tuple(i for k, i in match.of if k == first)
    return Mention(tokens.text[slice(*span)].lower(), (span,), match.experts, phrases)


def _noun(tokens: Tokens, item: Segment) -> Mention:
    """A subject of nobody, without its articles."""
    begin, end = item.noun.begin, item.noun.end
    span = tokens.span(next(i for i in range(begin, end) if tokens.words[i] not in known.DETERMINERS), end)
    return Mention(tokens.text[slice(*span)].lower(), (span,))


# ---- what touches


def _touching(
    tokens: Tokens,
    listed: Listing,
    phrases: Sequence[Sequence[str]],
    words: Sequence[Mapping[Span, int]],
    hidden: Sequence[Span],
) -> Iterator[Contact]:
    """The pairs with words between them that say so."""
    for touch in listed.touches:
        named = (_named(tokens, match) for match in touch.matches)
        subjects = [replace(subject, spans=tuple(sorted(s for k in subject.experts for s in words[k]))) for subject in named]
        own = [_with_brackets(tokens.text, *tokens.span(*phrase)) for phrase in touch.phrases]
        begin, end = min(own)[0], max(own)[1]
        first, second = (_part(tokens.text, begin, span, end, hidden) for span in own)
        nouns = [(begin, match) for (begin, _), match in zip(touch.phrases, touch.matches, strict=True)]
        why = why_not_per_subject(tokens, [(begin, end)], nouns, phrases)
        yield Contact((subjects[0], subjects[1]), touch.relation, (first, second), why)


def _of_both(
    tokens: Tokens,
    listed: Listing,
    phrases: Sequence[Sequence[str]],
    subjects: Sequence[Mention],
    own: Sequence[Span],
    hidden: Sequence[Span],
) -> Iterator[Contact]:
    """A list of two of whom it is said together: "a fox and an owl hugging"."""
    if len(subjects) != 2 or not all(subject.experts for subject in subjects):
        return
    begin = listed.items[-1].noun.end
    if (said := OF_BOTH.search(" ".join(tokens.words[begin:]))) is None:
        return
    begin, end = (begin + len(said.string[:place].split()) for place in said.span(1))
    following = [word for word in tokens.words[end : end + 1] if word.isalpha() and word[-2:] != "ly" and word != "together"]
    if any(kind(word) in (DETERMINER, WORD) for word in following):  # "hugging a tree", "fighting stance"
        return
    without = [*hidden, _with_comma(tokens.text, *tokens.span(begin, end))]
    first, second = (_part(tokens.text, own[0][0], span, own[1][1], without) for span in own)
    nouns = [(item.noun.begin, item.noun.name) for item in listed.items if item.noun.name is not None]
    why = why_not_per_subject(tokens, [*own, without[-1]], nouns, phrases)
    yield Contact((subjects[0], subjects[1]), "hugging", (first, second), why)


# ---- prompts of single subjects


def _part(text: str, start: int, span: Span, rest: int, hidden: Sequence[Span]) -> Part:
    """What stands before the list, one thing's phrase, and what follows the list, without what is hidden."""
    pieces = list[Span]()
    for begin, end in ((0, start), span, (rest, len(text))):
        for a, b in sorted(hidden):
            if begin < b and a < end:
                pieces.append((begin, max(begin, a)))
                begin = min(end, b)
        pieces.append((begin, end))
    whole = "".join(text[begin:end] for begin, end in pieces)
    left, kept, found = len(whole) - len(whole.lstrip(AROUND)), len(whole.strip(AROUND)), list[Span]()
    for begin, end in pieces:
        first = min(begin + left, max(begin, end))
        last = min(first + kept, end)
        if first < last:
            found.append((first, last))
            kept -= last - first
        left -= first - begin
    return Part(whole.strip(AROUND), tuple(found))


def _with_brackets(text: str, begin: int, end: int) -> Span:
    """A piece of text with the brackets and weights that belong to it."""
    unclosed = 0
    for letter in text[begin:end]:
        if unclosed or letter not in CLOSING:
            unclosed += (letter in OPENING) - (letter in CLOSING)
        elif text[begin - 1 : begin] in tuple(OPENING):  # "((fox)) standing"
            begin -= 1
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


def why_unparted(parts: Sequence[Part], subjects: Sequence[Mention], words: Sequence[Mapping[Span, int]]) -> str:
    """Words of a subject, or "she", must stand in no other thing's prompt, and every expert's words in some prompt."""
    for part, subject in zip(parts, subjects, strict=False):
        if any(other.has(begin) for begin, _ in subject.spans for other in parts if other is not part):
            return f"the prompt speaks of {subject.name!r} again outside of the list"
    if any(not any(part.has(begin) for part in parts) for each in words for begin, _ in each):
        return "words of a LoRA stand between the subjects that are listed"
    said = Counter(word for part in parts for word in set(Tokens(part.text).words) & known.ONE)
    if repeated := [word for word, times in said.items() if times > 1]:
        return f"the prompt says {repeated[0]!r} of one of them"
    return ""
