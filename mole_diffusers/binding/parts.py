"""A separate prompt for each thing that a prompt names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from mole_diffusers.binding.sentence import ARTICLE, BREAK, JOINED, LISTED, Sentence, Span, ends_list, parse
from mole_diffusers.binding.words import Reading, reading_of


@dataclass(frozen=True)
class Part:
    """A prompt made of pieces of another prompt.

    Attributes:
        text: the prompt.
        source: for each of its characters, the index of that character in the other prompt; None for a space that joins
            two pieces.
    """

    text: str
    source: tuple[int | None, ...]


class Apart(NamedTuple):
    """A prompt and its things. These are not listed in "a fox riding a horse", nor if words of one stand among those of
    another. With nouns that belong to no expert, only a plain list with "and" counts: "a fox, a lemon and a tiger".
    """

    reading: Reading  # how binding reads the prompt, with one character per token
    prompts: dict[int, Part]  # each thing's index in that reading -> its prompt, in the order of naming
    are_listed: bool  # whether the things are listed side by side, as by "and" or "left of"


def prompts_apart(
    prompt: str, phrases: Sequence[Sequence[str]], everywhere: Collection[int] = (), *, whole: Collection[int] = ()
) -> Apart:
    """A separate prompt for each thing: "ink drawing of a red fox and an owl in snow" gives "ink drawing of an owl in snow".

    The text before the first thing and after the last one applies to every thing. Line breaks are spaces, as to CLIP.

    Args:
        phrases: [N], each expert's words.
        everywhere: the experts whose words describe the whole picture.
        whole: see `words.read`.
    """
    sentence = parse(prompt.replace("\n", " "), [[phrase.strip().lower() for phrase in each] for each in phrases], whole)
    text, reading = sentence.text, reading_of(sentence, list(prompt))
    in_order = sorted(enumerate(sentence.mentions), key=lambda each: each[1].spans[0])
    things = {i: m for i, m in in_order if not (m.is_tag or (m.experts and set(m.experts) <= set(everywhere)))}
    if not things:
        return Apart(reading, {}, True)
    begins = [thing.spans[0][0] for thing in things.values()]
    named = []  # from the first word of each thing to its last, or the first alone if other things come between
    for thing in things.values():
        (begin, end), (_, last) = thing.spans[0], thing.spans[-1]
        named.append((begin, end if any(begin < other < last for other in begins) else last))
    own = _own_texts(text, named)
    before, after = _stripped(text, 0, own[0][0]), range(own[-1][1], len(text))
    sources = ([*before, None, *_stripped(text, *span), *after] for span in own)
    sides = _characters(sentence.sides)  # they place a thing among others, which means nothing in a tile
    prompts = {i: _part(prompt, [c for c in source if c not in sides]) for i, source in zip(things, sources, strict=True)}
    gaps = [text[end:begin] for (_, end), (begin, _) in pairwise(named)]
    listed = _are_listed(gaps, text[after.start :], all(thing.experts for thing in things.values()))
    return Apart(reading, prompts, listed and _are_parted(sentence, prompts))


def _own_texts(text: str, named: Sequence[Span]) -> list[Span]:
    """Where the text on each thing starts and stops: at breaks, such as a comma, or else with the thing and its article."""
    starts, stops = [_article(text, 0, named[0][0])], []
    for (_, end), (begin, _) in pairwise(named):
        breaks = list(BREAK.finditer(text[end:begin]))
        stops.append(end + breaks[0].start() if breaks else end)
        starts.append(end + breaks[-1].end() if breaks else _article(text, end, begin))
    return list(zip(starts, [*stops, named[-1][1]], strict=True))


def _article(text: str, start: int, noun: int) -> int:
    """Where the article of a noun is, or the noun itself if there is none after `start`."""
    article = ARTICLE.search(text[start:noun])
    return start + article.start() if article else noun


def _characters(spans: Iterable[Span]) -> set[int]:
    return {i for start, end in spans for i in range(start, end)}


def _stripped(text: str, start: int, end: int) -> range:
    """The characters of a piece of text, without the spaces around it."""
    piece = text[start:end]
    return range(start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip()))


def _part(prompt: str, source: Sequence[int | None]) -> Part:
    text = "".join(" " if i is None else prompt[i] for i in source)
    kept = _stripped(text, 0, len(text))
    return Part(text[kept.start : kept.stop], tuple(source[kept.start : kept.stop]))


def _are_listed(gaps: Sequence[str], tail: str, all_owned: bool) -> bool:
    """Whether things are listed side by side, given the texts between them and the text after the last one."""
    if all_owned or not gaps:
        return all(BREAK.search(gap) and LISTED.fullmatch(gap) for gap in gaps)
    return ends_list(gaps[-1], tail) and all(map(JOINED.fullmatch, gaps))


def _are_parted(sentence: Sentence, apart: dict[int, Part]) -> bool:
    """Whether every expert's words are in some part, and a thing's words are in no other thing's part."""
    parts = {i: set(part.source) for i, part in apart.items()}
    leaks = any(_characters(sentence.mentions[i].spans) & parts[j] for i in parts for j in parts if i != j)
    return not leaks and all(set().union(*parts.values()) >= _characters(each) for each in sentence.words)
