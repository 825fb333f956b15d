"""Which tokens of a prompt belong to which expert, and which of its words name things that have a place in the picture."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from string import punctuation
from typing import Any

MEDIA = (
    "drawing|painting|photo|photograph|picture|image|illustration|sketch|render|rendering|portrait|poster|sticker|icon|print|"
    "comic|cartoon|artwork|art|style"
)
FUNCTION_WORDS = "an?|the|of|in|on|at|and|with|to|by"
# A style stands before a medium, "ink drawing of", or after a word that says how or where: "in ink", "in the style of ink".
END = r"(?=\s+(?:of|in|on|with|style)\b|\s*[,.;\n]|\s*$)"  # what follows a medium: "a fox painting a wall" has none
BEFORE_MEDIUM = re.compile(rf"\s*(?:(?!(?:{FUNCTION_WORDS})\b)[\w-]+\s+){{0,2}}(?:{MEDIA})s?{END}")
AFTER_STYLE_WORD = re.compile(r"\b(?:in|style of|made of)\s+(?:(?:an?|the)\s+)?$|\bby\s+$")
RELATIONS = {  # words between two things -> (axis, whether the first has the smaller coordinate)
    "left of": ("x", True), "right of": ("x", False), "above": ("y", True), "over": ("y", True), "below": ("y", False),
    "under": ("y", False), "beneath": ("y", False),
}  # fmt: skip
RELATION = re.compile(rf"\s*(?:is\s+)?(?:(?:to|on)\s+the\s+)?({'|'.join(RELATIONS)})\s+(?:an?\s+|the\s+)?")
PLACE_WORDS = "(?:is )?(?:beside|next to|near|(?:(?:to|on) the )?(?:left|right) of|above|over|below|under|beneath)"
# Things are named side by side: "a fox and a lemon", "a fox, a lemon", "a fox left of a lemon".
BREAK = re.compile(rf"[,;.&+\n]|\b(?:and|{PLACE_WORDS})\b")
# All that is between two of them: "fox in a hat and an old owl", not "fox riding an owl" or "fox jumping over an owl".
LISTED = re.compile(
    rf"(?:.*(?:[,;.&+\n]|\band\b))?\s*(?:{PLACE_WORDS}\b)?\s*"
    r"(?:(?:an?|the|one|two|three)\s+(?:[\w'-]+\s+){0,3})?",
    re.DOTALL,
)
# What joins things where one is nobody's: "a fox, a lemon and a tiger". In other lists such nouns are as often none: "a fox,
# a sharp focus", "a fox with a red hat and a scarf", "a fox and the moon".
JOINED = re.compile(rf"\s*(?:,|,?\s*(?:and\b|[&+])|{PLACE_WORDS}\b)\s*(?:an?|one|two|three)\s+(?:[\w'-]+\s+){{0,3}}")
# The same between words of one LoRA: "a fox and an owl", "fox next to owl". Names need no article, where a LoRA has no other
# words there: "miku and rin", but not "miku with long hair and blue eyes".
APART = re.compile(rf"{JOINED.pattern}|\s*{PLACE_WORDS}\s*")
NAMES_APART = re.compile(rf"{APART.pattern}|\s*(?:and\b|[&+])\s*")
AND = re.compile(rf"\band\b|[&+]|\b{PLACE_WORDS}\b")
NOUN = re.compile(r"^\s*(?:an?|the|one|two|three)\s+([\w' -]+?)\s*(?=$|\b(?:in|on|of|at|with|from|under|by|to|is|are)\b)")
ARTICLE = re.compile(r"\b(?:an?|the|one|two|three)\s+(?:[\w'-]+\s+){0,3}$")  # with what is between it and its noun
DRAWN_NOUN = re.compile(rf"\b(?:{MEDIA})\s+of\s+(?:an?|the)\s+([\w' -]+?)\s*(?=$|\b(?:in|on|of|at|with)\b)")

ThingKey = tuple[tuple[int, ...], str, int]  # whose words these are, or the noun, and how many of the same come before it


@dataclass(frozen=True)
class Thing:
    """Something that the text says is in the picture.

    Attributes:
        name: its words, as the text has them.
        experts: those whose words these are; none for a noun that no expert owns.
        tokens: [T] bool, the tokens of its words.
    """

    name: str
    experts: tuple[int, ...]
    tokens: tuple[bool, ...]


@dataclass(frozen=True)
class Reading:
    """One text as binding reads it.

    Attributes:
        own: [N][T] bool: the tokens of each expert's words.
        things: what has a place in the picture: experts' words that are not said of the whole picture, and nouns beside
            them that no expert owns.
        relations: (first thing, second thing, "x" or "y"): the first has the smaller coordinate.
    """

    own: tuple[tuple[bool, ...], ...]
    things: tuple[Thing, ...] = ()
    relations: tuple[tuple[int, int, str], ...] = ()

    @property
    def mentioned(self) -> tuple[bool, ...]:
        """[N]: whose words the text has."""
        return tuple(any(tokens) for tokens in self.own)


def read(ids: Sequence[int], tokenizer: Any, phrases: Sequence[Sequence[str]], *, whole: Collection[int] = ()) -> Reading:
    """Find the words of every expert in a tokenised text: whole words of any case, or their plurals.

    Where phrases of two experts overlap the longer one counts; a word that both name belongs to both. Phrases of one expert
    name one thing, unless they stand apart in a plain list with "and": "a fox and an owl" are two.

    Args:
        ids: of one row, [T].
        phrases: [N], each expert's words; none for an expert that has none.
        whole: the experts whose words name one thing, however they stand.
    """
    special, added = set(tokenizer.all_special_tokens), set(tokenizer.get_added_vocab())
    pieces = ["\n" if t in special else _as_text(t, added) for t in tokenizer.convert_ids_to_tokens(list(ids))]
    return _reading(pieces, [[_surface(phrase, tokenizer, added) for phrase in each] for each in phrases], whole)


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
        not. Nouns that are nobody's are only in a plain list with "and", as "a fox, a lemon and a tiger".
    """
    reading = _reading(list(prompt), [[phrase.strip().lower() for phrase in each] for each in phrases], whole)
    begins = {
        i: thing.tokens.index(True)
        for i, thing in enumerate(reading.things)
        if not thing.experts or not set(thing.experts) <= set(everywhere)
    }
    order = sorted(begins, key=begins.__getitem__)
    at = {}
    for i, begin in begins.items():  # to its last word, or its first where other things come between
        tokens = reading.things[i].tokens
        end = len(tokens) - tokens[::-1].index(True)
        between = any(begin < other < end for other in begins.values())
        at[i] = begin, begin + len(reading.things[i].name) if between else end
    if not order:
        return reading, {}, True
    before = prompt[: at[order[0]][0]]
    article = ARTICLE.search(before.lower())
    edges = [article.start() if article else len(before)]  # where what is said of one thing alone begins and ends, in turn
    gaps = []
    for i, j in zip(order, order[1:], strict=False):
        end, start = at[i][1], at[j][0]
        gaps.append(gap := prompt[end:start].lower())
        breaks = [match.span() for match in BREAK.finditer(gap)]
        article = ARTICLE.search(gap)
        edges += [end + breaks[0][0], end + breaks[-1][1]] if breaks else [end, end + article.start() if article else start]
    edges.append(at[order[-1]][1])
    head, tail = _stripped(prompt, 0, edges[0]), range(edges[-1], len(prompt))
    own = (_stripped(prompt, a, b) for a, b in zip(edges[::2], edges[1::2], strict=True))
    apart = {i: _part(prompt, [*head, *([None] if head else []), *each, *tail]) for i, each in zip(order, own, strict=True)}
    return reading, apart, _are_listed(gaps, prompt[edges[-1] :].lower(), all(reading.things[i].experts for i in order))


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
    return _ends_list(gaps[-1], tail) and all(map(JOINED.fullmatch, gaps))


def _ends_list(gap: str, tail: str) -> bool:
    """Whether this text between two things is that before the last of a list; "a cup of tea" is none."""
    return bool(AND.search(gap)) and not re.match(r"\s+of\b", tail)


def _reading(pieces: Sequence[str], phrases: Sequence[Sequence[str]], whole: Collection[int]) -> Reading:
    """As `read`, of a text that consists of these pieces; phrases are in lower case."""
    ends = list(accumulate(map(len, pieces)))
    text = "".join(pieces)
    text = text.lower() if len(text.lower()) == len(text) else text

    def tokens(span: tuple[int, int]) -> tuple[bool, ...]:
        return tuple(
            end > span[0] and end - len(piece) < span[1] and piece.strip() != ""
            for piece, end in zip(pieces, ends, strict=True)
        )

    spans = _spans(text, phrases)
    own = tuple(_union([tokens(span) for span in each], len(pieces)) for each in spans)
    named: dict[tuple[tuple[int, int], ...], list[int]] = {}  # where a thing is named -> whose words these are
    placed = [[span for span in each if not _is_style(text, span)] for each in spans]
    everyones = sorted({span for each in placed for span in each})
    listed, names = (_lists(text, everyones, between) for between in (APART, NAMES_APART))
    for k, each in enumerate(placed):
        apart = next((words for words in names if words.issuperset(each)), set().union(*listed))
        for at in [tuple(each)] if k in whole else _by_thing(text, each, apart):
            if at:
                named.setdefault(at, []).append(k)
    owned, located = ([span for each in group for span in each] for group in (spans, named))
    found = [(at, tuple(experts)) for at, experts in named.items()]
    found += [((span,), ()) for span in _other_nouns(text, owned, located)]
    things = [
        Thing(text[slice(*at[0])].strip(), who, _union([tokens(span) for span in at], len(pieces))) for at, who in found
    ]
    places = {i: at[0] for i, (at, _) in enumerate(found)}
    return Reading(own, tuple(things), tuple(_relations(text, places)))


def _lists(text: str, spans: Sequence[tuple[int, int]], between: re.Pattern[str]) -> list[set[tuple[int, int]]]:
    """Lists of these words, which stand from left to right, with `between` from each to the next, and "and" or a place."""
    lists: list[list[tuple[int, int]]] = []
    for span in spans:
        if lists and between.fullmatch(text[lists[-1][-1][1] : span[0]]):
            lists[-1].append(span)
        else:
            lists.append([span])
    return [
        set(each) for each in lists if len(each) > 1 and _ends_list(text[each[-2][1] : each[-1][0]], text[each[-1][1] :])
    ]


def _by_thing(
    text: str, spans: Sequence[tuple[int, int]], listed: Collection[tuple[int, int]]
) -> list[tuple[tuple[int, int], ...]]:
    """One expert's words, from left to right, thing by thing: each phrase that is listed names one, and the others are said
    of the last one before them, or of the first."""
    names = list(dict.fromkeys(text[slice(*span)].lower() for span in spans if span in listed))
    if len(names) < 2:
        return [tuple(spans)]
    things: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    now = names[0]
    for span in spans:
        now = name if (name := text[slice(*span)].lower()) in things else now
        things[now].append(span)
    return [tuple(each) for each in things.values()]


def joined(readings: Sequence[Reading]) -> Reading:
    """Texts token after token: of several encoders, or parts of a long prompt. What both name is one thing."""
    lengths = [len(reading.own[0]) for reading in readings]
    return _merged(readings, [0, *accumulate(lengths[:-1])], sum(lengths))


def overlaid(readings: Sequence[Reading]) -> Reading:
    """Texts of several encoders whose states lie side by side: a token is of every word that one of them has there."""
    return _merged(readings, [0] * len(readings), max(len(reading.own[0]) for reading in readings))


def _merged(readings: Sequence[Reading], starts: Sequence[int], length: int) -> Reading:
    if len(readings) == 1:
        return readings[0]

    def placed(tokens: tuple[bool, ...], start: int) -> tuple[bool, ...]:
        return (False,) * start + tokens + (False,) * (length - start - len(tokens))

    own = [[placed(r.own[k], at) for r, at in zip(readings, starts, strict=True)] for k in range(len(readings[0].own))]
    named: dict[ThingKey, list[tuple[str, tuple[bool, ...]]]] = {}
    relations: dict[tuple[int, int, str], None] = {}
    for reading, at in zip(readings, starts, strict=True):
        called = keys(reading.things)
        for key, thing in zip(called, reading.things, strict=True):
            named.setdefault(key, []).append((thing.name, placed(thing.tokens, at)))
        index = [list(named).index(key) for key in called]
        relations |= {(index[a], index[b], axis): None for a, b, axis in reading.relations}
    things = [Thing(each[0][0], experts, _union([t for _, t in each], length)) for (experts, *_), each in named.items()]
    return Reading(tuple(_union(each, length) for each in own), tuple(things), tuple(relations))


def keys(things: Sequence[Thing]) -> list[ThingKey]:
    """What two texts, or one text in other tokens, call alike: the second lemon of one is the second of the other."""
    names = [(thing.experts, "" if thing.experts else re.sub(r"\W", "", thing.name)) for thing in things]
    return [(*name, names[:i].count(name)) for i, name in enumerate(names)]


def _as_text(token: str, added: Collection[str]) -> str:
    """A token as the text it stands for; CLIP ends words with a mark, T5 and byte-level tokenizers begin them with one.

    Added tokens, as those of a textual inversion, are words without a mark.
    """
    if token in added:
        return f" {token} "
    return token.replace("</w>", " ").replace("▁", " ").replace("Ġ", " ")


def _surface(phrase: str, tokenizer: Any, added: Collection[str]) -> str:
    return "".join(_as_text(token, added) for token in tokenizer.tokenize(phrase)).strip().lower()


def pattern(phrase: str) -> re.Pattern[str]:
    """Finds a phrase in a text: its whole words in any case, or their plural."""
    phrase = phrase.lower()
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    for end, other in (("y", "ies"), ("fe", "ves"), ("f", "ves")):
        if phrase.endswith(end):
            words = f"{words.removesuffix(end)}(?:{end}|{other})"
            break
    plural = "" if phrase[-1:] in punctuation else r"(?:'?e?s)?"
    return re.compile(rf"(?<!\w){words}{plural}(?!\w)", re.IGNORECASE)


def _spans(text: str, phrases: Sequence[Sequence[str]]) -> list[list[tuple[int, int]]]:
    """[N]: where each expert's phrases stand in the text; a phrase inside a longer one of another expert does not count."""
    found = [
        (match.span(), k)
        for k, each in enumerate(phrases)
        for phrase in each
        if phrase
        for match in pattern(phrase).finditer(text)
    ]
    spans: list[list[tuple[int, int]]] = [[] for _ in phrases]
    for (a, b), k in sorted(set(found)):
        if not any(c <= a and b <= d and (d - c) > (b - a) for (c, d), _ in found):
            spans[k].append((a, b))
    return spans


def _union(masks: Sequence[tuple[bool, ...]], length: int) -> tuple[bool, ...]:
    return tuple(map(any, zip(*masks, strict=True))) if masks else (False,) * length


def _is_style(text: str, span: tuple[int, int]) -> bool:
    """Whether words are said of the whole picture: a style or a setting."""
    return bool(
        BEFORE_MEDIUM.match(text, span[1])
        or AFTER_STYLE_WORD.search(text[: span[0]])
        or re.search(rf"\b(?:{MEDIA})\b", text[slice(*span)])
    )


def _other_nouns(
    text: str, owned: Sequence[tuple[int, int]], located: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Noun phrases with an article that stand beside those of the experts, and are no expert's."""
    edges = [0, *(edge for match in BREAK.finditer(text) for edge in match.span()), len(text)]
    if not located:
        return
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        noun = NOUN.match(text[a:b])
        if noun is None:
            noun = DRAWN_NOUN.search(text[a:b])
        if noun is None or any(a <= c < b for c, _ in located):
            continue
        start, end = a + noun.start(1), a + noun.end(1)
        if not any(c < end and start < d for c, d in owned) and not noun[1].strip().endswith("background"):
            yield start, end


def _relations(text: str, places: dict[int, tuple[int, int]]) -> Iterator[tuple[int, int, str]]:
    for i, (_, end) in places.items():
        between = RELATION.match(text, end)
        second = next((j for j, (start, _) in places.items() if between and between.end() == start and j != i), None)
        if between and second is not None:
            axis, first_is_smaller = RELATIONS[between[1]]
            yield (i, second, axis) if first_is_smaller else (second, i, axis)
