"""Which tokens of a prompt belong to which expert, and which words name things that have a place in the picture."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from mole_diffusers.binding.sentence import Sentence, Span, parse

BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()} | {" ": ord(" ")}
ThingKey = tuple[tuple[int, ...], str, int]  # experts, or the noun, and how many of the same come before


@dataclass(frozen=True)
class Thing:
    """Something that, according to the text, is in the picture.

    Attributes:
        name: its words in the text.
        experts, phrases, is_tag: see `sentence.Mention`.
        tokens: [T] bool, the tokens of its words.
    """

    name: str
    experts: tuple[int, ...]
    tokens: tuple[bool, ...]
    phrases: tuple[int, ...] = ()
    is_tag: bool = False


@dataclass(frozen=True)
class Reading:
    """One text as binding reads it.

    Attributes:
        own: [N][T] bool: the tokens of each expert's words.
        things: what has a place in the picture: experts' words that do not describe the whole picture, and nouns next to
            them that belong to no expert.
        relations: (first thing, second thing, "x" or "y"): the first has the smaller coordinate.
    """

    own: tuple[tuple[bool, ...], ...]
    things: tuple[Thing, ...] = ()
    relations: tuple[tuple[int, int, str], ...] = ()

    @property
    def mentioned(self) -> tuple[bool, ...]:
        """[N]: whether the text has words of this expert."""
        return tuple(any(tokens) for tokens in self.own)


def read(ids: Sequence[int], tokenizer: Any, phrases: Sequence[Sequence[str]], *, whole: Collection[int] = ()) -> Reading:
    """Find the words of every expert in a tokenised text: whole words in any case, or their plurals.

    If phrases of two experts overlap, the longer one counts. A word that two experts name belongs to both. Phrases of
    one expert name one thing, unless they are separate items of a plain list with "and": "a fox and an owl" are two.

    Args:
        ids: of one row, [T].
        phrases: [N], each expert's words; empty for an expert that has none.
        whole: the experts whose words always name one thing: those for which the user gave a region, or the whole picture.
    """
    special, added = set(tokenizer.all_special_tokens), set(tokenizer.get_added_vocab())
    pieces = ["\n" if t in special else _as_text(t, added) for t in tokenizer.convert_ids_to_tokens(list(ids))]
    surfaces = [[_surface(phrase, tokenizer, added) for phrase in each] for each in phrases]
    return reading_of(parse("".join(pieces), surfaces, whole), pieces)


def reading_of(sentence: Sentence, pieces: Sequence[str]) -> Reading:
    """Turn a sentence into a reading by tokens; `pieces` are the tokens' texts."""
    ends = list(accumulate(map(len, pieces)))

    def tokens(spans: Iterable[Span]) -> tuple[bool, ...]:
        return tuple(
            piece.strip() != "" and any(end > start and end - len(piece) < stop for start, stop in spans)
            for piece, end in zip(pieces, ends, strict=True)
        )

    things = [
        Thing(sentence.text[slice(*each.spans[0])].strip(), each.experts, tokens(each.spans), each.phrases, each.is_tag)
        for each in sentence.mentions
    ]
    return Reading(tuple(tokens(each) for each in sentence.words), tuple(things), sentence.relations)


def joined(readings: Sequence[Reading]) -> Reading:
    """Join texts whose tokens follow each other: of several encoders, or chunks of a long prompt. What both name is one
    thing.
    """
    lengths = [len(reading.own[0]) for reading in readings]
    starts = [0, *accumulate(lengths[:-1])]
    return _merged([_padded(reading, at, sum(lengths)) for reading, at in zip(readings, starts, strict=True)])


def overlaid(readings: Sequence[Reading]) -> Reading:
    """Combine texts of several encoders whose states lie side by side: a token belongs to a word if it does in any text."""
    length = max(len(reading.own[0]) for reading in readings)
    return _merged([_padded(reading, 0, length) for reading in readings])


def _padded(reading: Reading, start: int, length: int) -> Reading:
    """A text whose tokens begin at `start` among `length`."""

    def padded(tokens: tuple[bool, ...]) -> tuple[bool, ...]:
        return (False,) * start + tokens + (False,) * (length - start - len(tokens))

    things = tuple(replace(thing, tokens=padded(thing.tokens)) for thing in reading.things)
    return replace(reading, own=tuple(map(padded, reading.own)), things=things)


def _merged(readings: Sequence[Reading]) -> Reading:
    """One reading of several texts that have the same tokens."""
    if len(readings) == 1:
        return readings[0]
    same: dict[ThingKey, list[Thing]] = {}  # key -> the same thing in each text
    relations: dict[tuple[int, int, str], None] = {}
    separate = _separate_names(reading.things for reading in readings)
    for reading in readings:
        common = _common_keys(reading.things, separate)
        for thing, its_keys in zip(reading.things, common, strict=True):
            for key in its_keys:
                same.setdefault(key, []).append(thing)
        index = [list(same).index(its_keys[0]) for its_keys in common]
        relations |= {(index[a], index[b], axis): None for a, b, axis in reading.relations}
    things = [
        Thing(
            each[0].name,
            experts,
            _union(thing.tokens for thing in each),
            tuple(dict.fromkeys(phrase for thing in each for phrase in thing.phrases)),
            all(thing.is_tag for thing in each),
        )
        for (experts, *_), each in same.items()
    ]
    own = zip(*(reading.own for reading in readings), strict=True)  # [N] of the tokens in each text
    return Reading(tuple(map(_union, own)), tuple(things), tuple(relations))


def _separate_names(texts: Iterable[Sequence[Thing]]) -> dict[tuple[int, ...], list[int]]:
    """Experts that name several things in one text -> the phrases that name these, in the text that names most."""
    most: dict[tuple[int, ...], list[int]] = {}
    for things in texts:
        names: dict[tuple[int, ...], list[int]] = {}
        for thing in things:
            if thing.experts:
                names.setdefault(thing.experts, []).append(thing.phrases[0])
        for experts, phrases in names.items():
            if len(phrases) > max(1, len(most.get(experts, ()))):
                most[experts] = phrases
    return most


def _common_keys(things: Sequence[Thing], separate: Mapping[tuple[int, ...], Sequence[int]]) -> list[list[ThingKey]]:
    """[thing of one text] -> its keys in all the texts together, given the `_separate_names` of these.

    There is one key, or several if another text names separately what this text treats as one. For the same LoRA, "a fox
    and an owl" in `prompt` are two things with keys [[fox], [owl]]; "fox, owl" in `prompt_2` is one with [[fox, owl]].
    """
    common = [[key] for key in keys(things)]
    for i, thing in enumerate(things):
        if phrases := separate.get(thing.experts):
            said = [phrase for phrase in phrases if phrase in thing.phrases] or phrases[:1]
            common[i] = [(thing.experts, str(phrase), 0) for phrase in said]
    return common


def keys(things: Sequence[Thing]) -> list[ThingKey]:
    """Keys that match things of two texts, or of one text in other tokens: the second lemon of one is the second of the
    other.
    """
    separate = _separate_names([things])
    names = [
        (str(t.phrases[0]) if t.experts in separate else "") if t.experts else re.sub(r"\W", "", t.name) for t in things
    ]
    called = [(thing.experts, name) for thing, name in zip(things, names, strict=True)]
    return [(*name, called[:i].count(name)) for i, name in enumerate(called)]


def _as_text(token: str, added: Collection[str]) -> str:
    """The text of a token. CLIP marks the end of a word, T5 and byte-level tokenizers its beginning.

    Added tokens, such as those of a textual inversion, are words without a mark. CLIP and others write "ñ" as its
    bytes, "Ã±".
    """
    if token in added:
        return f" {token} "
    text = token.replace("</w>", " ").replace("▁", " ").replace("Ġ", " ")
    try:
        decoded = bytes(BYTES[letter] for letter in text).decode()
    except (KeyError, UnicodeDecodeError):  # T5's "ñ", or a part of a letter
        return text
    return decoded if decoded.strip().isalpha() else text


def _surface(phrase: str, tokenizer: Any, added: Collection[str]) -> str:
    return "".join(_as_text(token, added) for token in tokenizer.tokenize(phrase)).strip().lower()


def _union(masks: Iterable[tuple[bool, ...]]) -> tuple[bool, ...]:
    return tuple(map(any, zip(*masks, strict=True)))
