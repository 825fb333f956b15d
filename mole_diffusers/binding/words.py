"""Which tokens of a prompt belong to which expert, and which of its words name things that have a place in the picture."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, count
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
SIDES = {"left": ("x", True), "right": ("x", False), "top": ("y", True), "bottom": ("y", False)}  # of the picture, likewise
# "A fox on the left", "on the right side of the picture is a fox"; not "on the left cheek", "to the left of a road".
SIDE = re.compile(
    rf"\s*\b(?:is\s+)?(?:on|to|at|in)\s+the\s+({'|'.join(SIDES)})(?:\s+(?:side|half))?"
    rf"(?:\s+of\s+the\s+(?:{MEDIA}|canvas))?(?:\s+(?:there\s+)?(?:is|are))?"
    r"(?=\s*(?:[,;.:&+\n]|\band\b|\b(?:an?|the|one|two|three)\b|$))"
)
RELATION = re.compile(
    rf"\s*(?:is\s+)?(?:(?:to|on)\s+the\s+)?({'|'.join(RELATIONS)})\s+"
    r"(?:(?:an?|the|one|two|three)\s+(?:[\w'-]+\s+){0,3})?"
)
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
APART = re.compile(rf"{JOINED.pattern.replace('an?|one', 'an?|the|one')}|\s*{PLACE_WORDS}\s*")
NAMES_APART = re.compile(rf"{APART.pattern}|\s*(?:and\b|[&+])\s*")
# Before a list that says what something has: "a girl with long hair and blue eyes", but not "photo with miku and rin".
HAD = re.compile(
    rf"(?:\b({MEDIA})s?\s+)?\b(?:with|wearing|holding|carrying|has|having)\s+"
    rf"(?:(?:an?|the|her|his|its|their)\s+)?(?:(?!(?:{FUNCTION_WORDS})\b)[\w'-]+\s+){{0,2}}$"
)
# What is before and after a tag, which stands alone between commas, maybe with a weight.
BEFORE_TAG = re.compile(r"(?:^|[,;.\n])[\s(\[]*$")
AFTER_TAG = re.compile(r"(?:\s*:[\s\d.]+)?\s*[)\]]*\s*(?:[,;.\n]|$)")
AND = re.compile(rf"\band\b|[&+]|\b{PLACE_WORDS}\b")
NOUN = re.compile(r"^\s*(?:an?|the|one|two|three)\s+([\w' -]+?)\s*(?=$|\b(?:in|on|of|at|with|from|under|by|to|is|are)\b)")
ARTICLE = re.compile(r"\b(?:an?|the|one|two|three)\s+(?:[\w'-]+\s+){0,3}$")  # with what is between it and its noun
DRAWN_NOUN = re.compile(rf"\b(?:{MEDIA})\s+of\s+(?:an?|the)\s+([\w' -]+?)\s*(?=$|\b(?:in|on|of|at|with)\b)")

Span = tuple[int, int]  # in a text: its first character, and the one after its last
ThingKey = tuple[tuple[int, ...], str, int]  # whose words these are, or the noun, and how many of the same come before it


@dataclass(frozen=True)
class Thing:
    """Something that the text says is in the picture.

    Attributes:
        name: its words, as the text has them.
        experts: those whose words these are; none for a noun that no expert owns.
        tokens: [T] bool, the tokens of its words.
        phrases: which of its first expert's phrases these are, by index; first the one that names it.
        is_tag: whether they stand alone between commas, in no list with "and". Such words do not say whether they name a
            thing beside others or a style, so they have no place.
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
        not, nor where words of one stand among those of another. Nouns that are nobody's are only in a plain list with
        "and", as "a fox, a lemon and a tiger".
    """
    reading = _reading(list(prompt), [[phrase.strip().lower() for phrase in each] for each in phrases], whole)
    begins = {
        i: thing.tokens.index(True)
        for i, thing in enumerate(reading.things)
        if not thing.is_tag and (not thing.experts or not set(thing.experts) <= set(everywhere))
    }
    text, sides = _without_sides(_lowered(prompt))
    order = sorted(begins, key=begins.__getitem__)
    at = {}
    for i, begin in begins.items():  # to its last word, or its first where other things come between
        tokens = reading.things[i].tokens
        end = len(tokens) - tokens[::-1].index(True)
        between = any(begin < other < end for other in begins.values())
        at[i] = begin, begin + len(reading.things[i].name) if between else end
    if not order:
        return reading, {}, True
    before = text[: at[order[0]][0]]
    article = ARTICLE.search(before)
    edges = [article.start() if article else len(before)]  # where what is said of one thing alone begins and ends, in turn
    gaps = []
    for i, j in zip(order, order[1:], strict=False):
        end, start = at[i][1], at[j][0]
        gaps.append(gap := text[end:start])
        breaks = [match.span() for match in BREAK.finditer(gap)]
        article = ARTICLE.search(gap)
        edges += [end + breaks[0][0], end + breaks[-1][1]] if breaks else [end, end + article.start() if article else start]
    edges.append(at[order[-1]][1])
    said = {i for a, b, *_ in sides for i in range(a, b)}  # of places, which a tile has not
    kept = [i for i in range(edges[-1], len(prompt)) if i not in said]
    head, tail = [i for i in _stripped(text, 0, edges[0]) if i not in said], kept
    own = ([i for i in _stripped(text, a, b) if i not in said] for a, b in zip(edges[::2], edges[1::2], strict=True))
    apart = {i: _part(prompt, [*head, *([None] if head else []), *each, *tail]) for i, each in zip(order, own, strict=True)}
    listed = _are_listed(gaps, text[edges[-1] :], all(reading.things[i].experts for i in order))
    return reading, apart, listed and _are_parted(reading, apart)


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


def _are_parted(reading: Reading, apart: dict[int, Part]) -> bool:
    """Whether each of the experts' words is in a part, and those of a thing in no other's."""
    parts = {i: set(part.source) for i, part in apart.items()}
    leaks = any(set(compress(count(), reading.things[i].tokens)) & parts[j] for i in parts for j in parts if i != j)
    return not leaks and set().union(*parts.values()).issuperset(compress(count(), map(any, zip(*reading.own, strict=True))))


def _ends_list(gap: str, tail: str) -> bool:
    """Whether this text between two things is that before the last of a list; "a cup of tea" is none."""
    return bool(AND.search(gap)) and not re.match(r"\s+of\b", tail)


def _reading(pieces: Sequence[str], phrases: Sequence[Sequence[str]], whole: Collection[int]) -> Reading:
    """As `read`, of a text that consists of these pieces; phrases are in lower case."""
    ends = list(accumulate(map(len, pieces)))
    text, sides = _without_sides(_lowered("".join(pieces)))

    def tokens(span: Span) -> tuple[bool, ...]:
        return tuple(
            end > span[0] and end - len(piece) < span[1] and piece.strip() != ""
            for piece, end in zip(pieces, ends, strict=True)
        )

    spans = _spans(text, phrases)
    own = tuple(_union([tokens(span) for span in each], len(pieces)) for each in spans)
    named: dict[tuple[Span, ...], list[int]] = {}  # where a thing is named -> whose words these are
    placed = [[span for span in each if not _is_style(text, span)] for each in spans]
    everyones = sorted({span for each in placed for span in each})
    tags = _tags(text, everyones)
    listed, names = (_lists(text, everyones, between) for between in (APART, NAMES_APART))
    if len(at_sides := {everyones[i] for i in _on_sides(text, dict(enumerate(everyones)), sides)}) > 1:
        listed.append(at_sides)
    for k, each in enumerate(placed):
        theirs, bare = ([words for words in lists if not _is_had(text, words, each, tags)] for lists in (listed, names))
        apart = next((words for words in bare if words.issuperset(each)), set().union(*theirs))
        for at in _by_thing({span: _phrase(text, span, phrases[k]) for span in each}, () if k in whole else apart):
            if at:
                named.setdefault(at, []).append(k)
    owned, located = ([span for each in group for span in each] for group in (spans, named))
    found = [(at, tuple(experts)) for at, experts in named.items()]
    found += [((span,), ()) for span in _other_nouns(text, owned, located)]
    places = {i: at[0] for i, (at, _) in enumerate(found)}
    of_side = _on_sides(text, places, sides)
    are_tags = [
        tags.issuperset(at) and i not in of_side and not set(whole).intersection(who) for i, (at, who) in enumerate(found)
    ]
    things = [
        Thing(
            text[slice(*at[0])].strip(),
            who,
            _union([tokens(span) for span in at], len(pieces)),
            tuple(dict.fromkeys(_phrase(text, span, phrases[who[0]]) for span in at)) if who else (),
            is_tag,
        )
        for (at, who), is_tag in zip(found, are_tags, strict=True)
    ]
    with_place = [i for i in places if not are_tags[i]]
    relations = dict.fromkeys([*_relations(text, places), *_side_relations(of_side, with_place)])
    return Reading(own, tuple(things), tuple(relations))


def _lowered(text: str) -> str:
    """A text in lower case, if that has as many characters."""
    return lower if len(lower := text.lower()) == len(text) else text


def _without_sides(text: str) -> tuple[str, list[tuple[int, int, str, bool]]]:
    """A text with spaces instead of words as "on the left", and of each such place: where it was said, and as in `SIDES`."""
    sides = []
    for match in SIDE.finditer(text):
        start, end = match.span()
        if re.search(r"(?:^|[,;.:\n]|\band)$", text[:start]):  # "on the left, a fox"
            end = re.compile(r"\s*[,:]?").match(text, end).end()  # type: ignore[union-attr]
        sides.append((start, end, *SIDES[match[1]]))
    for start, end, *_ in sides:
        text = text[:start] + " " * (end - start) + text[end:]
    return text, sides


def _on_sides(
    text: str, places: dict[int, Span], sides: Sequence[tuple[int, int, str, bool]]
) -> dict[int, tuple[str, bool]]:
    """Of which thing each side is said: of the one before it, unless something parts the two, else of the next one."""
    of_side: dict[int, tuple[str, bool]] = {}
    for start, end, axis, is_first in sides:
        before = max((i for i in places if places[i][1] <= start), key=lambda i: places[i], default=None)
        if before is None or BREAK.search(text[places[before][1] : start]):
            before = min((i for i in places if places[i][0] >= end), key=lambda i: places[i], default=None)
        if before is not None:
            of_side.setdefault(before, (axis, is_first))
    return of_side


def _side_relations(of_side: dict[int, tuple[str, bool]], things: Collection[int]) -> Iterator[tuple[int, int, str]]:
    """A thing on the left is left of those that are on the right, or of which nothing is said."""
    for i, (axis, is_first) in of_side.items():
        for j in things:
            if i != j and of_side.get(j, (axis, not is_first)) == (axis, not is_first):
                yield (i, j, axis) if is_first else (j, i, axis)


def _tags(text: str, spans: Sequence[Span]) -> set[Span]:
    """Those of these words, from left to right, that are tags; not those of a list with "and", as "fox, owl and bear"."""
    tags: set[Span] = set()
    following, following_is_listed = len(text), False
    for start, end in reversed(spans):
        gap = text[end:following] if following < len(text) else ""
        listed = bool(AND.search(gap)) or (following_is_listed and gap.strip() == ",")
        if not listed and BEFORE_TAG.search(text[:start]) and AFTER_TAG.match(text, end):
            tags.add((start, end))
        following, following_is_listed = start, listed
    return tags


def _lists(text: str, spans: Sequence[Span], between: re.Pattern[str]) -> list[set[Span]]:
    """Lists of these words, which stand from left to right, with `between` from each to the next, and "and" or a place."""
    lists: list[list[Span]] = []
    for span in spans:
        if lists and between.fullmatch(text[lists[-1][-1][1] : span[0]]):
            lists[-1].append(span)
        else:
            lists.append([span])
    return [
        set(each) for each in lists if len(each) > 1 and _ends_list(text[each[-2][1] : each[-1][0]], text[each[-1][1] :])
    ]


def _is_had(text: str, listed: Collection[Span], spans: Sequence[Span], tags: Collection[Span]) -> bool:
    """Whether a list is of what something has, as "a girl with long hair and blue eyes", or says more of what one expert's
    words, from left to right, named before it: "a knight with a sword and a shield", "miku, a hat and a scarf"."""
    start = min(listed)[0]
    before = [span for span in spans if span[1] <= start]
    had = HAD.search(text[:start])
    if had and not had[1]:
        return True
    return bool(before) and (before[-1] in tags or not BREAK.search(text[before[-1][1] : start]))


def _phrase(text: str, span: Span, phrases: Sequence[str]) -> int:
    """Which of an expert's phrases stands there."""
    return next(i for i, phrase in enumerate(phrases) if phrase and pattern(phrase).fullmatch(text[slice(*span)]))


def _by_thing(spans: Mapping[Span, int], listed: Collection[Span]) -> list[tuple[Span, ...]]:
    """One expert's words, from left to right, thing by thing: each phrase that is listed names one, and the others are said
    of the last one before them, or of the first. Spans are given with their phrases."""
    names = list(dict.fromkeys(phrase for span, phrase in spans.items() if span in listed))
    if len(names) < 2:
        return [tuple(spans)]
    things: dict[int, list[Span]] = {name: [] for name in names}
    now = names[0]
    for span, phrase in spans.items():
        now = phrase if phrase in things else now
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
    several: dict[tuple[int, ...], list[int]] = {}  # the phrases that name experts' things, in the text that names most
    for reading in readings:
        for experts, names in _names(reading.things).items():
            several[experts] = max(several.get(experts, []), names, key=len)
    named: dict[ThingKey, list[tuple[Thing, tuple[bool, ...]]]] = {}
    relations: dict[tuple[int, int, str], None] = {}
    for reading, at in zip(readings, starts, strict=True):
        called = [_keys_of(thing, key, several) for thing, key in zip(reading.things, keys(reading.things), strict=True)]
        for each, thing in zip(called, reading.things, strict=True):
            for key in each:
                named.setdefault(key, []).append((thing, placed(thing.tokens, at)))
        index = [list(named).index(each[0]) for each in called]
        relations |= {(index[a], index[b], axis): None for a, b, axis in reading.relations}
    things = [
        Thing(
            each[0][0].name,
            experts,
            _union([tokens for _, tokens in each], length),
            tuple(dict.fromkeys(phrase for thing, _ in each for phrase in thing.phrases)),
            all(thing.is_tag for thing, _ in each),
        )
        for (experts, *_), each in named.items()
    ]
    return Reading(tuple(_union(each, length) for each in own), tuple(things), tuple(relations))


def _names(things: Sequence[Thing]) -> dict[tuple[int, ...], list[int]]:
    """Experts -> the phrases that name their things."""
    names: dict[tuple[int, ...], list[int]] = {}
    for thing in things:
        if thing.experts:
            names.setdefault(thing.experts, []).append(thing.phrases[0])
    return names


def _keys_of(thing: Thing, key: ThingKey, several: Mapping[tuple[int, ...], Sequence[int]]) -> list[ThingKey]:
    """A thing of one text as another text calls it that names several of its experts: as all that its words name."""
    if len(names := several.get(thing.experts, ())) < 2:
        return [key]
    return [(thing.experts, str(name), 0) for name in names if name in thing.phrases] or [(thing.experts, str(names[0]), 0)]


def keys(things: Sequence[Thing]) -> list[ThingKey]:
    """What two texts, or one text in other tokens, call alike: the second lemon of one is the second of the other."""
    several = _names(things)
    names = [
        (str(t.phrases[0]) if len(several[t.experts]) > 1 else "") if t.experts else re.sub(r"\W", "", t.name)
        for t in things
    ]
    called = [(thing.experts, name) for thing, name in zip(things, names, strict=True)]
    return [(*name, called[:i].count(name)) for i, name in enumerate(called)]


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


def _spans(text: str, phrases: Sequence[Sequence[str]]) -> list[list[Span]]:
    """[N]: where each expert's phrases stand in the text; a phrase inside a longer one of another expert does not count."""
    found = [
        (match.span(), k)
        for k, each in enumerate(phrases)
        for phrase in each
        if phrase
        for match in pattern(phrase).finditer(text)
    ]
    spans: list[list[Span]] = [[] for _ in phrases]
    for (a, b), k in sorted(set(found)):
        if not any(c <= a and b <= d and (d - c) > (b - a) for (c, d), _ in found):
            spans[k].append((a, b))
    return spans


def _union(masks: Sequence[tuple[bool, ...]], length: int) -> tuple[bool, ...]:
    return tuple(map(any, zip(*masks, strict=True))) if masks else (False,) * length


def _is_style(text: str, span: Span) -> bool:
    """Whether words are said of the whole picture: a style or a setting."""
    return bool(
        BEFORE_MEDIUM.match(text, span[1])
        or AFTER_STYLE_WORD.search(text[: span[0]])
        or re.search(rf"\b(?:{MEDIA})\b", text[slice(*span)])
    )


def _other_nouns(text: str, owned: Sequence[Span], located: Sequence[Span]) -> Iterator[Span]:
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


def _relations(text: str, places: dict[int, Span]) -> Iterator[tuple[int, int, str]]:
    for i, (_, end) in places.items():
        after = min((j for j, (start, _) in places.items() if start >= end), key=places.__getitem__, default=None)
        if after is not None and (between := RELATION.fullmatch(text, end, places[after][0])):
            axis, first_is_smaller = RELATIONS[between[1]]
            yield (i, after, axis) if first_is_smaller else (after, i, axis)
