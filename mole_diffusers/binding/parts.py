"""The prompt of each thing that a prompt names, by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from mole_diffusers.binding.sentence import ARTICLE, BREAK, JOINED, LISTED, Sentence, Span, ends_list, parse
from mole_diffusers.binding.words import Reading, reading_of


@dataclass(frozen=True)
class Part:
    """A prompt made of pieces of another one.

    Attributes:
        text: the prompt.
        source: of each of its characters, which of the other prompt's it is; None for a space that joins two pieces.
    """

    text: str
    source: tuple[int | None, ...]


def prompts_apart(
    prompt: str, phrases: Sequence[Sequence[str]], everywhere: Collection[int] = (), *, whole: Collection[int] = ()
) -> tuple[Reading, dict[int, Part], bool]:
    """The prompt of each thing by itself: "ink drawing of an owl in snow" of "ink drawing of a red fox and an owl in snow".

    What is said before the first thing and after the last is said of each.

    Args:
        phrases: [N], each expert's words.
        everywhere: the experts whose words are said of the whole picture.
        whole: see `read`.

    Returns:
        how binding reads the prompt, with a character for a token; in the order of naming, each thing's index in it and
        prompt; and whether the things are listed side by side, as by "and" or "left of": in "a fox riding a horse" they are
        not, nor where words of one stand among those of another. Nouns that are nobody's are only in a plain list with
        "and", as "a fox, a lemon and a tiger".
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
    ends = []  # of each thing's last word, or its first where other things come between
    for i, begin in zip(order, begins, strict=True):
        last = spans[i][-1][1]
        ends.append(spans[i][0][1] if any(begin < other < last for other in begins) else last)
    article = ARTICLE.search(text[: begins[0]])
    edges = [article.start() if article else begins[0]]  # where what is said of one thing alone begins and ends, in turn
    gaps = [text[end:start] for end, start in zip(ends, begins[1:], strict=False)]
    for gap, end, start in zip(gaps, ends, begins[1:], strict=False):
        breaks, article = [match.span() for match in BREAK.finditer(gap)], ARTICLE.search(gap)
        edges += [end + breaks[0][0], end + breaks[-1][1]] if breaks else [end, end + article.start() if article else start]
    edges.append(ends[-1])
    places = _characters(sentence.sides)  # said of a thing beside others, and not in a tile
    head, *own = (
        [i for i in _stripped(text, a, b) if i not in places]
        for a, b in zip([0, *edges[::2]], [edges[0], *edges[1::2]], strict=True)
    )
    tail = [i for i in range(edges[-1], len(prompt)) if i not in places]
    apart = {i: _part(prompt, [*head, *([None] if head else []), *each, *tail]) for i, each in zip(order, own, strict=True)}
    listed = _are_listed(gaps, text[edges[-1] :], all(sentence.mentions[i].experts for i in order))
    return reading, apart, listed and _are_parted(sentence, apart)


def _characters(spans: Iterable[Span]) -> set[int]:
    return {i for start, end in spans for i in range(start, end)}


def _stripped(text: str, start: int, end: int) -> range:
    """The characters of a piece of a text, without spaces around it."""
    piece = text[start:end]
    return range(start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip()))


def _part(prompt: str, source: Sequence[int | None]) -> Part:
    text = "".join(" " if i is None else prompt[i] for i in source)
    kept = _stripped(text, 0, len(text))
    return Part(text[kept.start : kept.stop], tuple(source[kept.start : kept.stop]))


def _are_listed(gaps: Sequence[str], tail: str, all_owned: bool) -> bool:
    """Whether things are listed side by side that have these texts between them, and this one after the last."""
    if all_owned or not gaps:
        return all(BREAK.search(gap) and LISTED.fullmatch(gap) for gap in gaps)
    return ends_list(gaps[-1], tail) and all(map(JOINED.fullmatch, gaps))


def _are_parted(sentence: Sentence, apart: dict[int, Part]) -> bool:
    """Whether each of the experts' words is in a part, and those of a thing in no other's."""
    parts = {i: set(part.source) for i, part in apart.items()}
    leaks = any(_characters(sentence.mentions[i].spans) & parts[j] for i in parts for j in parts if i != j)
    return not leaks and all(set().union(*parts.values()) >= _characters(each) for each in sentence.words)
