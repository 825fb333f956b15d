"""Why subjects that a prompt lists are not drawn apart: what it says of several of them, or what is there once for all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, pairwise

from mole_diffusers.binding import vocabulary as known
from mole_diffusers.binding.finding import Match, Span, Tokens
from mole_diffusers.binding.listing import Listing
from mole_diffusers.binding.marking import MARKER, QUOTES, WORD, is_stop, kind
from mole_diffusers.binding.vocabulary import one_of

TOGETHER = re.compile(  # what two do together, "hand in hand", or what is said of several
    rf"(?<!\S)(?:(?P<act>{one_of(known.CONTACT)}|dance|fight|hold(?:ing|s) (?:hands|each)|(\S+) (?:in|to|by) \2)"
    rf"|{one_of(known.GROUPS)}|(?:each|the) other|the same|of one|left to right"
    r"|one (?:another|body|of|with|in|is|has|wearing))(?!\S)"
)
_PICTURE, _PERSON = one_of(known.PICTURES), one_of(known.PERSONS)
SHARED = re.compile(  # the same, unless it stands in what is said of one of them
    rf"(?<!\S)(?:{one_of(known.JOINT)}|(?:{_PICTURE})s|(?:two|2)(?: -)? shot|split screen|eye contact|at another"
    rf"|(?:body|face) swap|in (?:line|love|unison|sync|formation)|(?:wedding|engagement|anniversary) (?:{_PICTURE})"
    rf"|(?:{_PERSON}) and (?:a )?(?:{_PERSON})|with (?:\S+ )?(?:{one_of(known.COUNTED)})"
    r"|one \S+ , one|the (?:first|second)|high - fiv(?:e|ing)|playing cards|hang(?:s|ing) (?:on|over|above))(?!\S)"
)
SEVERAL = (  # how many there are: "2 girls", "two big people", "a set of"
    rf"(?<!\S)(?:\d+ (?:girl|boy|other)|(?:{one_of(known.SEVERAL)})(?: \S+){{{{0,2}}}}? (?:{{}})"
    rf"|(?:{one_of(known.GATHERINGS)}) of)(?!\S)"
)
COMPARED = "the prompt says which of them is larger"


def why_together(tokens: Tokens, listed: Listing, own: Sequence[Span], phrases: Sequence[Sequence[str]]) -> str:
    """Why the subjects of a list belong in one picture; "" if they may be drawn apart.

    Args:
        own: where each item stands in the text, with what is said of it alone.
        phrases: [N], each expert's words.
    """
    return next(chain(_reasons_in(tokens, listed, phrases), _reasons_around(tokens, listed, own)), "")


def _reasons_in(tokens: Tokens, listed: Listing, phrases: Sequence[Sequence[str]]) -> Iterator[str]:
    """What the items themselves say."""
    items = listed.items
    if items[0].joint in ("and", "or"):  # "strong and brave sks man and xyz woman"
        yield "it is not clear where the list begins"
    if any(is_stop(tokens.words, i) for i in range(items[0].stop, items[-1].noun.begin)):
        yield "the subjects stand in several sentences"
    if items[-1].said.is_aside and any(item.said.is_aside for item in items[:-1]):
        yield "it is not clear of whom it says what follows the list"  # "a fox, sitting, and an owl, flying"
    for item in items:
        if _is_unlike_one(tokens.words[item.noun.begin], item.noun.head, item.noun.name, phrases):
            yield f"{tokens.text[slice(*tokens.span(item.noun.begin, item.noun.end))]!r} is no single subject by itself"
    if _is_compared(word for item in items for word in item.noun.words):
        yield COMPARED


def _is_unlike_one(first: str, head: str, name: Match | None, phrases: Sequence[Sequence[str]]) -> bool:
    """Whether a noun phrase is said of several, "two cats", or of nobody's subject that belongs to another: "its mother".

    Args:
        first: its first word.
        head: its last one.
        name: the words of LoRAs in it.
    """
    if name is None and first in known.POSSESSIVES:
        return True
    is_plural = head in known.COUNTED or (head.endswith(("s", "men")) and not head.endswith(("ss", "us", "is")))
    stated = () if name is None else (Tokens(phrases[k][i]).words[-1] for k, i in name.of)
    return is_plural and first not in ("a", "an", "one") and head not in stated


def _is_compared(words: Iterable[str]) -> bool:
    """Whether these words of several noun phrases say which is the larger one: "a giant cat and a tiny dog"."""
    said = set(words)
    return bool(said & known.COMPARED or (said & known.LARGE and said & known.SMALL))


def _reasons_around(tokens: Tokens, listed: Listing, own: Sequence[Span]) -> Iterator[str]:
    """What the text says of several items, or besides them."""
    yield from _said_of_several(TOGETHER, tokens, ())
    for begin, end in listed.besides:
        if not _is_in(tokens.spans[begin], own):
            yield f"the prompt names {tokens.text[slice(*tokens.span(begin, end))]!r} besides"
    yield from _objects(tokens, [*listed.sides, (own[0][0], own[-1][1])])
    yield from _said_of_several(SHARED, tokens, own)
    yield from _counts(tokens, own, [item.noun.head for item in listed.items])


def why_not_per_subject(
    tokens: Tokens, own: Sequence[Span], subjects: Sequence[tuple[int, Match]], phrases: Sequence[Sequence[str]]
) -> str:
    """Why two that touch are not drawn apart; "" if they may be.

    Args:
        own: where each of the two stands in the text, and what they do.
        subjects: for both, the token that its noun phrase begins with, and its name.
        phrases: [N], each expert's words.
    """
    heads = [tokens.words[name.end - 1] for _, name in subjects]
    if any(_is_unlike_one(tokens.words[i], head, name, phrases) for (i, name), head in zip(subjects, heads, strict=True)):
        return "it speaks of several of one kind"
    if _is_compared(word for i, name in subjects for word in tokens.words[i : name.begin]):
        return COMPARED
    said = (_said_of_several(pattern, tokens, own) for pattern in (TOGETHER, SHARED))
    return next(chain(*said, _counts(tokens, own, heads), _objects(tokens, own)), "")


def _said_of_several(pattern: re.Pattern[str], tokens: Tokens, elsewhere: Collection[Span]) -> Iterator[str]:
    for found in _outside(pattern, tokens, elsewhere):
        if found.groupdict().get("act"):
            yield f"the prompt says {found[0]!r}, which two do together"
        yield f"the prompt speaks of several together: {found[0]!r}"


def _counts(tokens: Tokens, elsewhere: Collection[Span], heads: Sequence[str]) -> Iterator[str]:
    counted = "|".join([*sorted(known.COUNTED), *(re.escape(f"{head}s") for head in heads)])
    for found in _outside(re.compile(SEVERAL.format(counted)), tokens, elsewhere):
        yield f"the prompt counts several: {found[0]!r}"


def _outside(pattern: re.Pattern[str], tokens: Tokens, elsewhere: Collection[Span]) -> Iterator[re.Match[str]]:
    """Where a pattern is among the words of a text, but for some places in the text."""
    text = " ".join(tokens.words)
    for found in pattern.finditer(text):
        if not _is_in(tokens.spans[text.count(" ", 0, found.start())], elsewhere):
            yield found


def _objects(tokens: Tokens, elsewhere: Collection[Span]) -> Iterator[str]:
    """What is no setting, and is there for all: "on a sofa", but not "in a garden"."""
    words = tokens.words
    for i, (before, word) in enumerate(pairwise(("", *words))):
        if _is_in(tokens.spans[i], elsewhere):
            continue
        if word in known.ONE_OBJECT:
            yield _once(tokens, i, i + 1)
        elif word in known.DETERMINERS and kind(before) == MARKER and before != "from":
            end = i + 1
            while end < len(words) and words[end][0] not in QUOTES | {*",.;()"} and kind(words[end]) == WORD:
                end += 1
            head = words[end - 1]
            is_setting = before == "of" or known.is_scenery(head) or (head in known.GARMENTS and before != "on")
            if end > i + 1 and (head in known.PICTURES or not is_setting):
                yield _once(tokens, i - 1, end)


def _once(tokens: Tokens, begin: int, end: int) -> str:
    return f"the prompt says {tokens.text[slice(*tokens.span(begin, end))]!r} of all, which may be there once"


def _is_in(span: Span, others: Collection[Span]) -> bool:
    return any(begin <= span[0] < end for begin, end in others)
