"""A separate prompt for each thing that a prompt names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

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


def prompts_apart(
    prompt: str, phrases: Sequence[Sequence[str]], everywhere: Collection[int] = (), *, whole: Collection[int] = ()
) -> tuple[Reading, dict[int, Part], bool]:
    """A separate prompt for each thing: "ink drawing of a red fox and an owl in snow" gives "ink drawing of an owl in snow".

    The text before the first thing and after the last one applies to every thing.

    Args:
        phrases: [N], each expert's words.
        everywhere: the experts whose words describe the whole picture.
        whole: see `words.read`.

    Returns:
        Three values. First, how binding reads the prompt, with one character per token. Second, each thing's index in
        that reading -> its prompt, in the order of naming. Third, whether the things are listed side by side, as by
        "and" or "left of". In "a fox riding a horse" they are not, nor if words of one thing stand among those of
        another. With nouns that belong to no expert, only a plain list with "and" counts, such as "a fox, a lemon and a
        tiger".
    """
    sentence = parse(prompt, [[phrase.strip().lower() for phrase in each] for each in phrases], whole)
    text, reading = sentence.text, reading_of(sentence, list(prompt))
    spans = {
        i: mention.spans
        for i, mention in enumerate(sentence.mentions)
        if not mention.is_tag and (not mention.experts or not set(mention.experts) <= set(everywhere))
    }
    order = sorted(spans, key=lambda i: spans[i][0])
    if not order:
        return reading, {}, True
    begins = [spans[i][0][0] for i in order]
    ends = []  # the end of each thing's last word, or of its first if other things come between
    for i, begin in zip(order, begins, strict=True):
        last = spans[i][-1][1]
        ends.append(spans[i][0][1] if any(begin < other < last for other in begins) else last)
    gaps = [text[end:begin] for end, begin in zip(ends, begins[1:], strict=False)]
    article = ARTICLE.search(text[: begins[0]])
    starts, stops = [article.start() if article else begins[0]], []  # of the text on each thing alone
    for gap, end, begin in zip(gaps, ends, begins[1:], strict=False):
        breaks, article = [match.span() for match in BREAK.finditer(gap)], ARTICLE.search(gap)
        stops.append(end + breaks[0][0] if breaks else end)
        starts.append(end + breaks[-1][1] if breaks else end + article.start() if article else begin)
    stops.append(ends[-1])
    places = _characters(sentence.sides)  # they place a thing among others, which means nothing in a tile
    edges = [(0, starts[0]), *zip(starts, stops, strict=True)]
    head, *own = ([i for i in _stripped(text, *each) if i not in places] for each in edges)
    tail = [i for i in range(stops[-1], len(prompt)) if i not in places]
    apart = {i: _part(prompt, [*head, *([None] if head else []), *each, *tail]) for i, each in zip(order, own, strict=True)}
    listed = _are_listed(gaps, text[stops[-1] :], all(sentence.mentions[i].experts for i in order))
    return reading, apart, listed and _are_parted(sentence, apart)


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
