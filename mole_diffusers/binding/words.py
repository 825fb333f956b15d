"""Which tokens of a prompt belong to which expert, and which words name subjects that have a place in the picture."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from mole_diffusers.binding.chat import of_user
from mole_diffusers.binding.finding import Phrase, Span
from mole_diffusers.binding.sentence import ALL, Mention, Sentence, Who, parse

BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
SubjectKey = tuple[tuple[int, ...], str]  # experts, and the noun, or the phrase that sets it apart from their other subjects
Marks = tuple[bool, ...]  # [T]


@dataclass(frozen=True)
class Subject:
    """Something with a place in the picture, see `sentence.Mention`."""

    name: str
    experts: tuple[int, ...]
    tokens: Marks  # [T], those of its words
    phrases: tuple[int, ...] = ()
    attribute_adapters: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """One text as binding reads it."""

    own: tuple[Marks, ...]  # [N][T], the tokens of each expert's words
    subjects: tuple[Subject, ...] = ()  # those that the text lists side by side, and those with a region from the user
    relations: tuple[tuple[int, int, str], ...] = ()  # see `sentence.Sentence`
    said: Mapping[Phrase, Marks] = field(default_factory=dict)  # a phrase of an expert -> [T], its tokens

    @property
    def mentioned(self) -> tuple[bool, ...]:
        """[N]: whether the text has words of this expert."""
        return tuple(any(tokens) for tokens in self.own)


def read(ids: Sequence[int], tokenizer: Any, phrases: Sequence[Sequence[str]], who: Who = ALL) -> Reading:
    """Read a tokenised text: `ids` of one row, [T]. The other arguments are those of `sentence.parse`."""
    special, added = set(tokenizer.all_special_tokens), set(tokenizer.get_added_vocab())
    names = tokenizer.convert_ids_to_tokens(list(ids))
    users = zip(names, of_user(names), strict=True)
    pieces = [_as_text(name, added) if is_users and name not in special else "\n" for name, is_users in users]
    text, origin = _decoded(pieces)
    sentence = parse(text, phrases, who)
    return _by_pieces(sentence, pieces, origin)


def _by_pieces(sentence: Sentence, pieces: Sequence[str], origin: Sequence[int]) -> Reading:
    """A reading by tokens. `origin` has the place in the joined pieces of each character of the sentence's text."""
    ends = list(accumulate(map(len, pieces)))

    def tokens(spans: Iterable[Span]) -> Marks:
        marks, at = [False] * len(pieces), 0
        for start, stop in sorted((origin[a], origin[b]) for a, b in spans):
            while at < len(ends) and ends[at] <= start:
                at += 1
            t = at
            while t < len(ends) and ends[t] - len(pieces[t]) < stop:
                marks[t] = marks[t] or pieces[t].strip() != ""
                t += 1
        return tuple(marks)

    subjects = [
        Subject(each.name, each.experts, tokens(each.spans), each.phrases, each.attribute_adapters)
        for each in sentence.subjects
    ]
    by_phrase: dict[Phrase, list[Span]] = {}
    for k, words in enumerate(sentence.words):
        for span, i in words.items():
            by_phrase.setdefault((k, i), []).append(span)
    said = {phrase: tokens(spans) for phrase, spans in by_phrase.items()}
    return Reading(tuple(tokens(each) for each in sentence.words), tuple(subjects), sentence.relations, said)


def joined(readings: Sequence[Reading]) -> Reading:
    """Join texts whose tokens follow each other: of several encoders, or chunks of a long prompt."""
    lengths = [len(reading.own[0]) for reading in readings]
    starts = [0, *accumulate(lengths[:-1])]
    return _merged([_padded(reading, at, sum(lengths)) for reading, at in zip(readings, starts, strict=True)])


def overlaid(readings: Sequence[Reading]) -> Reading:
    """Combine texts of several encoders whose states lie side by side: a token belongs to a word if it does in any text."""
    length = max(len(reading.own[0]) for reading in readings)
    return _merged([_padded(reading, 0, length) for reading in readings])


def _padded(reading: Reading, start: int, length: int) -> Reading:
    """A text whose tokens begin at `start` among `length`."""

    def padded(tokens: Marks) -> Marks:
        return (False,) * start + tokens + (False,) * (length - start - len(tokens))

    subjects = tuple(replace(subject, tokens=padded(subject.tokens)) for subject in reading.subjects)
    said = {phrase: padded(tokens) for phrase, tokens in reading.said.items()}
    return Reading(tuple(map(padded, reading.own)), subjects, reading.relations, said)


def _merged(readings: Sequence[Reading]) -> Reading:
    """One reading of several texts that have the same tokens. The longest list counts; none, if another one differs."""
    if len(readings) == 1:
        return readings[0]
    own = tuple(map(_union, zip(*(reading.own for reading in readings), strict=True)))
    said: dict[Phrase, Marks] = {}
    tokens: dict[SubjectKey, list[Marks]] = {}
    for reading in readings:
        for phrase, marks in reading.said.items():
            said[phrase] = _union((said.get(phrase, marks), marks))
        for key, subject in zip(keys(reading.subjects), reading.subjects, strict=True):
            tokens.setdefault(key, []).append(subject.tokens)
    longest = max(readings, key=lambda reading: len(reading.subjects))
    experts = {subject.experts for subject in longest.subjects}
    if any(subject.experts not in experts for reading in readings for subject in reading.subjects if subject.experts):
        return Reading(own, (), (), said)
    subjects = [
        replace(subject, tokens=_union((*tokens[key], *_claimed(subject, longest.subjects, own, said))))
        for subject, key in zip(longest.subjects, keys(longest.subjects), strict=True)
    ]
    relations = dict.fromkeys(longest.relations)
    place = {key: i for i, key in enumerate(keys(longest.subjects))}
    for reading in readings:
        theirs = keys(reading.subjects)
        for a, b, axis in reading.relations:
            if theirs[a] in place and theirs[b] in place:
                relations[place[theirs[a]], place[theirs[b]], axis] = None
    return Reading(own, tuple(subjects), tuple(relations), said)


def _claimed(
    subject: Subject, subjects: Sequence[Subject], own: Sequence[Marks], said: Mapping[Phrase, Marks]
) -> Iterator[Marks]:
    """The tokens of its words in all texts, whether these list it or not."""
    for k in (*subject.experts, *subject.attribute_adapters):
        if sum(k in other.experts for other in subjects) < 2:
            yield own[k]
        else:
            yield from (tokens for (j, phrase), tokens in said.items() if j == k and phrase in subject.phrases)


def keys(subjects: Sequence[Subject | Mention]) -> list[SubjectKey]:
    """Keys that match subjects of two texts, or of one text in other tokens."""
    experts = [subject.experts for subject in subjects]
    return [
        (
            t.experts,
            (str(t.phrases[0]) if experts.count(t.experts) > 1 else "") if t.experts else re.sub(r"\W", "", t.name.lower()),
        )
        for t in subjects
    ]


def _as_text(token: str, added: Collection[str]) -> str:
    """The text of a token. CLIP marks the end of a word, T5 and byte-level tokenizers its beginning.

    Added tokens, such as those of a textual inversion, are words without a mark.
    """
    return f" {token} " if token in added else token.replace("</w>", " ").replace("▁", " ").replace("Ġ", " ")


def _decoded(pieces: Sequence[str]) -> tuple[str, list[int]]:
    """The text of pieces, and the place in the joined pieces of each of its characters.

    CLIP and others write "ñ" as its bytes, "Ã±". A word whose letters are not the bytes of a text stays as it is, as "ñ"
    of T5 does.
    """
    raw = "".join(pieces)
    text: list[str] = []
    origin: list[int] = []
    for match in re.finditer(r"\s+|\S+", raw):
        word, at = match[0], match.start()
        decoded = word
        if not word.isascii():
            try:
                decoded = bytes(BYTES[letter] for letter in word).decode()
            except (KeyError, UnicodeDecodeError):
                decoded = word
        if decoded is not word:
            for letter in decoded:
                origin.append(at)
                at += len(letter.encode())
        else:
            origin.extend(range(at, at + len(word)))
        text.append(decoded)
    return "".join(text), [*origin, len(raw)]


def _union(masks: Iterable[Marks]) -> Marks:
    return tuple(map(any, zip(*masks, strict=True)))
