"""What a text says: where experts' words are in it, which of them name things, and where those are in the picture."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import punctuation

MEDIA = (
    "drawing|painting|photo|photograph|picture|image|illustration|sketch|render|rendering|portrait|poster|sticker|icon|print|"
    "comic|cartoon|artwork|art|style"
)
FUNCTION_WORDS = "an?|the|of|in|on|at|and|with|to|by"
BEFORE_NOUN = r"(?:an?|the|one|two|three)\s+(?:[\w'-]+\s+){0,3}"  # an article, and the words between it and its noun
# A style is before a medium, "ink drawing of", or after a style word: "in ink", "in the style of ink". A tokenizer may
# have cut off its possessive: "monet 's drawing of".
END = r"(?=\s+(?:of|in|on|with|style)\b|\s*[,.;\n]|\s*$)"  # what follows a medium: "a fox painting a wall" has none
BEFORE_MEDIUM = re.compile(rf"(?:\s*['’]\s*s?\b)?\s*(?:(?!(?:{FUNCTION_WORDS})\b)[\w-]+\s+){{0,2}}(?:{MEDIA})s?{END}")
AFTER_STYLE_WORD = re.compile(r"\b(?:in|style of|made of)\s+(?:(?:an?|the)\s+)?$|\bby\s+$")
# Something worn or held is not a thing beside others: "a knight wearing a red cape", "a girl with blue eyes".
# But "a fox with an owl" and "photo with fox and owl" name two.
HELD = re.compile(
    rf"(?:\b({MEDIA})s?\s+)?\b(?:with|(?:wearing|wears|holding|holds|carrying|carries|has|having)(\s+(?:an?|the))?)\s+"
    rf"(?:(?!(?:{FUNCTION_WORDS}|one|two|three|beside|next|near|above|over|below|under|beneath)\b)[\w'-]+\s+){{0,3}}$"
)
RELATIONS = {  # words between two things -> (axis, whether the first has the smaller coordinate)
    "left of": ("x", True), "right of": ("x", False), "above": ("y", True), "over": ("y", True), "below": ("y", False),
    "under": ("y", False), "beneath": ("y", False),
}  # fmt: skip
SIDES = {"left": ("x", True), "right": ("x", False), "top": ("y", True), "bottom": ("y", False)}  # of the picture
# "A fox on the left", "on the right side of the picture is a fox"; not "on the left cheek", "to the left of a road".
SIDE = re.compile(
    rf"\s*\b(?:is\s+)?(?:on|to|at|in)\s+the\s+({'|'.join(SIDES)})(?:\s+(?:side|half))?"
    rf"(?:\s+of\s+the\s+(?:{MEDIA}|canvas))?(?:\s+(?:there\s+)?(?:is|are))?"
    r"(?=\s*(?:[,;.:&+\n]|\band\b|\b(?:an?|the|one|two|three)\b|$))"
)
RELATION = re.compile(rf"\s*(?:is\s+)?(?:(?:to|on)\s+the\s+)?({'|'.join(RELATIONS)})\s+(?:{BEFORE_NOUN})?")
PLACE_WORDS = "(?:is )?(?:beside|next to|near|(?:(?:to|on) the )?(?:left|right) of|above|over|below|under|beneath)"
# Things are named side by side: "a fox and a lemon", "a fox, a lemon", "a fox left of a lemon".
BREAK = re.compile(rf"[,;.&+\n]|\b(?:and|{PLACE_WORDS})\b")
# All that is between two of them: "fox in a hat and an old owl", not "fox riding an owl" or "fox jumping over an owl".
LISTED = re.compile(
    rf"(?:.*(?:[,;.&+\n]|\band\b))?\s*(?:{PLACE_WORDS}\b)?\s*"
    rf"(?:{BEFORE_NOUN})?",
    re.DOTALL,
)
# What joins things if one has no expert: "a fox, a lemon and a tiger". In other lists such nouns are often no things:
# "a fox, a sharp focus", "a fox with a red hat and a scarf", "a fox and the moon".
COMMA_OR_AND = rf"\s*(?:,|,?\s*(?:and\b|[&+])|{PLACE_WORDS}\b)\s*"
JOINED = re.compile(rf"{COMMA_OR_AND}(?:an?|one|two|three)\s+(?:[\w'-]+\s+){{0,3}}")
# The same between words of one LoRA: "a fox and an owl", "fox next to owl". Names need no article if the LoRA has no other
# words there: "miku and rin", but not "miku with long hair and blue eyes".
APART = re.compile(rf"{COMMA_OR_AND}{BEFORE_NOUN}|\s*{PLACE_WORDS}\s*")
NAMES_APART = re.compile(rf"{APART.pattern}|\s*(?:and\b|[&+])\s*")
# The text before and after a tag. A tag stands alone between commas, maybe with a weight.
BEFORE_TAG = re.compile(r"(?:^|[,;.\n])[\s(\[]*$")
AFTER_TAG = re.compile(r"(?:\s*:[\s\d.]+)?\s*[)\]]*\s*(?:[,;.\n]|$)")
AND = re.compile(rf"\band\b|[&+]|\b{PLACE_WORDS}\b")
NOUN = re.compile(r"^\s*(?:an?|the|one|two|three)\s+([\w' -]+?)\s*(?=$|\b(?:in|on|of|at|with|from|under|by|to|is|are)\b)")
ARTICLE = re.compile(rf"\b{BEFORE_NOUN}$")
DRAWN_NOUN = re.compile(rf"\b(?:{MEDIA})\s+of\s+(?:an?|the)\s+([\w' -]+?)\s*(?=$|\b(?:in|on|of|at|with)\b)")

Span = tuple[int, int]  # in a text: its first character, and the one after its last
Side = tuple[str, bool]  # of the picture, as in `SIDES`


@dataclass(frozen=True)
class Mention:
    """Something that a text names.

    Attributes:
        spans: where its words are, from left to right.
        experts: the experts that the words belong to; none for a noun without an expert.
        phrases: the indices of these words among the phrases of the first expert, starting with the one that names the
            thing.
        is_tag: whether the words stand alone between commas, outside of a list with "and". Such words may name a thing
            or a style, so they get no place.
    """

    spans: tuple[Span, ...]
    experts: tuple[int, ...] = ()
    phrases: tuple[int, ...] = ()
    is_tag: bool = False


@dataclass(frozen=True)
class Sentence:
    """A text as binding reads it.

    Attributes:
        text: in lower case, with spaces instead of the words in `sides`.
        words: [N], where each expert's words are, and the index of that phrase.
        mentions: what has a place in the picture, or is a tag.
        relations: (first mention, second mention, "x" or "y"): the first has the smaller coordinate.
        sides: words for a side of the picture, such as "on the left".
    """

    text: str
    words: tuple[Mapping[Span, int], ...]
    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, int, str], ...]
    sides: Mapping[Span, Side]


def parse(text: str, phrases: Sequence[Sequence[str]], whole: Collection[int] = ()) -> Sentence:
    """Read a text. The arguments are those of `words.read`, with phrases in lower case."""
    text, sides = _without_sides(lower if len(lower := text.lower()) == len(text) else text)
    words = _words(text, phrases)
    placeless = _held(text, sorted({span for each in words for span in each}))
    placeless |= {span for each in words for span in each if _is_style(text, span)}
    located = [{span: phrase for span, phrase in each.items() if span not in placeless} for each in words]
    everyones = sorted({span for each in located for span in each})
    tags = _tags(text, everyones)
    mentions = _mentions(text, located, everyones, tags, sides, whole)
    mentions += [Mention((span,)) for span in _other_nouns(text, [s for each in words for s in each], everyones)]
    places = {i: mention.spans[0] for i, mention in enumerate(mentions)}
    of_side = _on_sides(text, places, sides)
    mentions = [
        replace(m, is_tag=tags.issuperset(m.spans) and i not in of_side and not set(whole).intersection(m.experts))
        for i, m in enumerate(mentions)
    ]
    with_place = [i for i, mention in enumerate(mentions) if not mention.is_tag]
    relations = dict.fromkeys([*_relations(text, places), *_side_relations(of_side, with_place)])
    return Sentence(text, tuple(words), tuple(mentions), tuple(relations), sides)


def pattern(phrase: str) -> re.Pattern[str]:
    """A regular expression for a phrase: its whole words in any case, or their plural."""
    phrase = phrase.lower()
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    for end, other in (("y", "ies"), ("fe", "ves"), ("f", "ves")):
        if phrase.endswith(end):
            words = f"{words.removesuffix(end)}(?:{end}|{other})"
            break
    plural = "" if phrase[-1:] in punctuation else r"(?:'?e?s)?"
    return re.compile(rf"(?<!\w){words}{plural}(?!\w)", re.IGNORECASE)


def _words(text: str, phrases: Sequence[Sequence[str]]) -> list[dict[Span, int]]:
    """[N]: where each expert's phrases are in the text, and which. A phrase inside a longer one of any expert does not
    count.
    """
    found = [
        (match.span(), k, i)
        for k, each in enumerate(phrases)
        for i, phrase in enumerate(each)
        if phrase
        for match in pattern(phrase).finditer(text)
    ]
    outer, end = set(), -1
    for span in sorted({span for span, *_ in found}, key=lambda span: (span[0], -span[1])):
        if span[1] > end:  # otherwise it lies inside of one before it
            outer.add(span)
            end = span[1]
    words: list[dict[Span, int]] = [{} for _ in phrases]
    for span, k, i in sorted(found):
        if span in outer:
            words[k].setdefault(span, i)
    return words


def _is_style(text: str, span: Span) -> bool:
    """Whether words are said of the whole picture: a style or a setting."""
    return bool(
        BEFORE_MEDIUM.match(text, span[1])
        or AFTER_STYLE_WORD.search(text[: span[0]])
        or re.search(rf"\b(?:{MEDIA})\b", text[slice(*span)])
    )


def _held(text: str, spans: Sequence[Span]) -> set[Span]:
    """Those of these words, from left to right, that say what somebody has: they have no place of their own."""
    held: dict[Span, bool] = {}  # and whether without an article
    before = (0, 0)
    for span in spans:
        found = HELD.search(text[: span[0]])
        if found and not found[1]:
            held[span] = found[2] is None
        elif held.get(before) and re.fullmatch(r"\s*(?:and|[&+])\s*", text[before[1] : span[0]]):
            held[span] = True  # "with blue eyes and long hair"; of "wearing a hat and miku" she is not worn
        before = span
    return set(held)


def _mentions(
    text: str,
    located: Sequence[Mapping[Span, int]],
    everyones: Sequence[Span],
    tags: Collection[Span],
    sides: Mapping[Span, Side],
    whole: Collection[int],
) -> list[Mention]:
    """What the words of experts name that are not said of the whole picture; `everyones` are all of them in order."""
    lists, lists_of_names = (_lists(text, everyones, between) for between in (APART, NAMES_APART))
    if len(at_sides := {everyones[i] for i in _on_sides(text, dict(enumerate(everyones)), sides)}) > 1:
        lists.append(at_sides)
    named: dict[tuple[Span, ...], list[int]] = {}  # where a thing is named -> the experts of these words
    for k, own in enumerate(located):
        if k in whole:  # they name one thing
            listed: Collection[Span] = ()
        elif any(names.issuperset(own) for names in lists_of_names):  # "miku and rin", without other words of the expert
            listed = own
        else:  # "a fox and an owl", not "a knight with a sword and a shield"
            listed = {span for words in lists if not _says_more(text, words, own, tags) for span in words}
        for spans in _by_thing(own, listed):
            named.setdefault(spans, []).append(k)
    return [
        Mention(spans, tuple(experts), tuple(dict.fromkeys(located[experts[0]][span] for span in spans)))
        for spans, experts in named.items()
    ]


def _by_thing(spans: Mapping[Span, int], listed: Collection[Span]) -> list[tuple[Span, ...]]:
    """Divide one expert's words, from left to right, among its things. Spans come with their phrases.

    Each listed phrase names a thing. Other phrases belong to the last listed one before them, or to the first.
    """
    names = list(dict.fromkeys(phrase for span, phrase in spans.items() if span in listed))
    if len(names) < 2:
        return [tuple(spans)] if spans else []
    things: dict[int, list[Span]] = {name: [] for name in names}
    now = names[0]
    for span, phrase in spans.items():
        now = phrase if phrase in things else now
        things[now].append(span)
    return [tuple(each) for each in things.values()]


def _lists(text: str, spans: Sequence[Span], between: re.Pattern[str]) -> list[set[Span]]:
    """Lists of these words, from left to right: `between` separates neighbours, and there is an "and" or a place word."""
    lists: list[list[Span]] = []
    for span in spans:
        if lists and between.fullmatch(text[lists[-1][-1][1] : span[0]]):
            lists[-1].append(span)
        else:
            lists.append([span])
    return [set(each) for each in lists if len(each) > 1 and ends_list(text[each[-2][1] : each[-1][0]], text[each[-1][1] :])]


def _says_more(text: str, listed: Collection[Span], spans: Collection[Span], tags: Collection[Span]) -> bool:
    """Whether a list only describes what one expert's words named before it.

    Examples are "a knight with a sword and a shield" and "miku, a hat and a scarf".
    """
    start = min(listed)[0]
    before = [span for span in spans if span[1] <= start]
    return bool(before) and (before[-1] in tags or not BREAK.search(text[before[-1][1] : start]))


def ends_list(gap: str, tail: str) -> bool:
    """Whether the text between two things is that before the last item of a list; not in "a cup of tea"."""
    return bool(AND.search(gap)) and not re.match(r"\s+of\b", tail)


def _tags(text: str, spans: Sequence[Span]) -> set[Span]:
    """The tags among these words, from left to right. Words in a list with "and" are none: "fox, owl and bear"."""
    tags: set[Span] = set()
    following, following_is_listed = len(text), False
    for start, end in reversed(spans):
        gap = text[end:following] if following < len(text) else ""
        listed = bool(AND.search(gap)) or (following_is_listed and gap.strip() == ",")
        if not listed and BEFORE_TAG.search(text[:start]) and AFTER_TAG.match(text, end):
            tags.add((start, end))
        following, following_is_listed = start, listed
    return tags


def _other_nouns(text: str, owned: Sequence[Span], located: Sequence[Span]) -> Iterator[Span]:
    """Noun phrases with an article, next to those of the experts, that belong to no expert."""
    edges = [0, *(edge for match in BREAK.finditer(text) for edge in match.span()), len(text)]
    if not located:
        return
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        noun = NOUN.match(text[a:b]) or DRAWN_NOUN.search(text[a:b])
        if noun is None or not noun[1].strip() or any(a <= c < b for c, _ in located):
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


def _without_sides(text: str) -> tuple[str, dict[Span, Side]]:
    """The text with spaces instead of words such as "on the left", and where these were."""
    sides = {}
    for match in SIDE.finditer(text):
        start, end = match.span()
        if re.search(r"(?:^|[,;.:\n]|\band)$", text[:start]):  # "on the left, a fox"
            end += len(re.match(r"\s*[,:]?", text[end:])[0])  # type: ignore[index]
        sides[start, end] = SIDES[match[1]]
    for start, end in sides:
        text = text[:start] + " " * (end - start) + text[end:]
    return text, sides


def _on_sides(text: str, places: Mapping[int, Span], sides: Mapping[Span, Side]) -> dict[int, Side]:
    """Thing -> its side: a side belongs to the thing before it, or to the next one if something separates the two."""
    of_side: dict[int, Side] = {}
    for (start, end), side in sides.items():
        thing = max((i for i in places if places[i][1] <= start), key=places.__getitem__, default=None)
        if thing is None or BREAK.search(text[places[thing][1] : start]):
            thing = min((i for i in places if places[i][0] >= end), key=places.__getitem__, default=None)
        if thing is not None:
            of_side.setdefault(thing, side)
    return of_side


def _side_relations(of_side: Mapping[int, Side], things: Collection[int]) -> Iterator[tuple[int, int, str]]:
    """A thing on the left is left of things on the right and of things without a side."""
    for i, (axis, is_first) in of_side.items():
        for j in things:
            if i != j and of_side.get(j, (axis, not is_first)) == (axis, not is_first):
                yield (i, j, axis) if is_first else (j, i, axis)
