"""Why things that a prompt lists are not drawn apart: what it says of several of them, or what is there once for all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, pairwise

from mole_diffusers.binding import vocabulary as known
from mole_diffusers.binding.finding import Span, Tokens
from mole_diffusers.binding.listing import Listing
from mole_diffusers.binding.marking import MARKER, QUOTES, WORD, is_stop, kind
from mole_diffusers.binding.segments import NounPhrase
from mole_diffusers.binding.vocabulary import one_of

TOGETHER = re.compile(  # what two do together, "hand in hand", or what is said of several
    rf"(?<!\S)(?:(?P<act>{one_of(known.CONTACT)}|dance|fight|hold(?:ing|s) (?:hands|each)|(\S+) (?:in|to|by) \2)"
    rf"|{one_of(known.GROUPS)}|(?:each|the) other|the same|of one|left to right"
    r"|one (?:another|body|of|with|in|is|has|wearing))(?!\S)"
)
SEVERAL = (  # how many there are: "2 girls", "two big people", "a set of"
    rf"(?<!\S)(?:\d+ (?:girl|boy|other)|(?:{one_of(known.SEVERAL)})(?: \S+){{{{0,2}}}}? (?:{{}})"
    rf"|(?:{one_of(known.GATHERINGS)}) of)(?!\S)"
)


def why_together(tokens: Tokens, listed: Listing, own: Sequence[Span], phrases: Sequence[Sequence[str]]) -> str:
    """Why the things of a list belong in one picture; "" if they may be drawn apart.

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
        yield "the things stand in several sentences"
    if items[-1].said.is_aside and any(item.said.is_aside for item in items[:-1]):
        yield "it is not clear of whom it says what follows the list"  # "a fox, sitting, and an owl, flying"
    for item in items:
        if _is_unlike_one(tokens.words[item.noun.begin], item.noun, phrases):
            yield f"{tokens.text[slice(*tokens.span(item.noun.begin, item.noun.end))]!r} is no single thing by itself"


def _is_unlike_one(first: str, noun: NounPhrase, phrases: Sequence[Sequence[str]]) -> bool:
    """Whether a noun phrase is said of several, "two cats", or of nobody's thing that belongs to another: "its mother"."""
    if noun.name is None and first in known.POSSESSIVES:
        return True
    is_plural = noun.head.endswith(("s", "men")) and not noun.head.endswith(("ss", "us", "is"))
    stated = () if noun.name is None else (Tokens(phrases[k][i]).words[-1] for k, i in noun.name.of)
    return is_plural and first not in ("a", "an", "one") and noun.head not in stated


def _reasons_around(tokens: Tokens, listed: Listing, own: Sequence[Span]) -> Iterator[str]:
    """What the text says of several items, or besides them."""
    text = " ".join(tokens.words)
    if found := TOGETHER.search(text):
        if found["act"]:
            yield f"the prompt says {found[0]!r}, which two do together"
        yield f"the prompt speaks of several together: {found[0]!r}"
    for begin, end in listed.besides:
        if not _is_in(tokens.spans[begin], own):
            yield f"the prompt names {tokens.text[slice(*tokens.span(begin, end))]!r} besides"
    for begin, end in _objects(tokens, [*listed.sides, (own[0][0], own[-1][1])]):
        yield f"the prompt says {tokens.text[slice(*tokens.span(begin, end))]!r} of all, which may be there once"
    counted = "|".join([*sorted(known.COUNTED), *(re.escape(f"{item.noun.head}s") for item in listed.items)])
    for found in re.finditer(SEVERAL.format(counted), text):
        if not _is_in(tokens.spans[text.count(" ", 0, found.start())], own):
            yield f"the prompt counts several: {found[0]!r}"


def _objects(tokens: Tokens, elsewhere: Collection[Span]) -> Iterator[Span]:
    """The tokens (begin, end) that name something for all items that is no setting: "on a sofa", but not "in a garden"."""
    words = tokens.words
    for i, (before, word) in enumerate(pairwise(("", *words))):
        if _is_in(tokens.spans[i], elsewhere):
            continue
        if word in known.ONE_OBJECT:
            yield i, i + 1
        elif word in known.DETERMINERS and kind(before) == MARKER and before not in ("of", "from"):
            end = i + 1
            while end < len(words) and words[end][0] not in QUOTES | {*",.;()"} and kind(words[end]) == WORD:
                end += 1
            if end > i + 1 and not (known.is_scenery(words[end - 1]) or words[end - 1] in known.GARMENTS):
                yield i - 1, end


def _is_in(span: Span, others: Collection[Span]) -> bool:
    return any(begin <= span[0] < end for begin, end in others)
