"""The mixer's cards, one per LoRA: a view of the prompt's tags.

The prompt is the source of truth. A card that is switched off remembers its whole tag.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mole_app.studio.names import known_names, matching_lora
from mole_app.studio.prompt_syntax import TAG, LoraTag, Parsed, number, parse
from mole_diffusers.binding import AUTO, spans
from mole_diffusers.inspection import COLOURS

# name, on, tag (its text), colour (an index of COLOURS), picked (by hand, not by typing a tag); plain data for a gr.State
MixerCard = dict[str, Any]
ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def parse_named(prompt: str, known: Collection[str], preferred: Callable[[str], float | None] = lambda _: None) -> Parsed:
    """The parsed prompt. Its tags have the known names of their LoRAs, however these were typed, and a `preferred` strength
    if they were typed without one.

    Raises ValueError for two tags of one LoRA, and what `parse` raises.
    """
    parsed = parse(prompt, known)
    tags = {name: replace(tag, name=name) for tag in parsed.tags for name in [matching_lora(tag.name, known) or tag.name]}
    if len(tags) < len(parsed.tags):
        raise ValueError(f"two tags of the prompt mean the same LoRA: {', '.join(tag.name for tag in parsed.tags)}")
    return replace(parsed, tags=tuple(tag.or_at(preferred) for tag in tags.values()))


def cards_of(
    prompt: str,
    cards: Sequence[MixerCard],
    known: Collection[str],
    preferred: Callable[[str], float | None] = lambda _: None,
) -> list[MixerCard]:
    """The cards after the prompt has changed. Each takes its tag from the prompt.

    Without a tag there, a card is off if its LoRA was picked or it was off before; one that a tag brought goes with the tag.
    """
    tags = {tag.name: str(tag) for tag in parse_named(prompt, known, preferred).tags}
    if unknown := [name for name in tags if name not in known]:
        raise ValueError(f"there is no LoRA {unknown[0]!r}; {known_names(unknown[0], known)}")
    stay = [card for card in cards if card["name"] in tags or card["picked"] or not card["on"]]
    found = [{**card, "on": card["name"] in tags, "tag": tags.get(card["name"], card["tag"])} for card in stay]
    for name in tags:
        if name not in [card["name"] for card in found]:
            found.append({"name": name, "on": True, "tag": tags[name], "colour": _free_colour(found), "picked": False})
    return found


def without_bad_tags(prompt: str, known: Collection[str]) -> str:
    """The prompt's tags that can be read and whose LoRAs are known, each LoRA once."""
    kept: list[str] = []
    for tag in TAG.finditer(prompt):
        with suppress(ValueError):
            cards_of(" ".join([*kept, tag[0]]), [], known)
            kept.append(tag[0])
    return " ".join(kept)


def newest(prompt: str, rewrites: Sequence[str]) -> str:
    """The current prompt. An event that was sent before the page showed the last rewrite has an older one."""
    return rewrites[-1] if prompt in rewrites else prompt


def _free_colour(cards: Sequence[MixerCard]) -> int:
    """The first colour that no card has. A LoRA keeps its colour while others come and go."""
    taken = [card["colour"] for card in cards]
    return min(range(len(COLOURS)), key=lambda i: (taken.count(i), i))


def shades(cards: Sequence[MixerCard]) -> dict[str, str]:
    """LoRA -> its colour."""
    return {card["name"]: COLOURS[card["colour"]] for card in cards}


def fields_of(card: MixerCard, known: Collection[str]) -> dict[str, Any]:
    """The fields of a card's tag, as the card shows them. All are text except "word", a list of phrases. "unet" is the
    strength: a number, or a list over the steps. Raises ValueError for a name that a tag cannot contain."""
    tag = next(iter(parse(card["tag"], known).tags), None)
    if tag is None:
        raise ValueError(f"the name {card['name']!r} contains < or >, which end a tag; rename the file")
    stop = "" if tag.stop is None else str(tag.stop)
    fields = {"unet": str(tag.unet), "te": str(tag.te), "lbw": tag.lbw, "start": str(tag.start or ""), "stop": stop}
    return {**fields, "word": [word for word in tag.word.split("|") if word], "region": tag.region or AUTO}


def edit(
    prompt: str, cards: Sequence[MixerCard], name: str, known: Collection[str], *, on: bool = True, **fields: Any
) -> tuple[str, list[MixerCard]]:
    """The prompt and the cards after one LoRA is switched on or off, or fields of its tag change (see `fields_of`).

    A LoRA without a card gets one, at strength 1. Raises ValueError for fields that a tag cannot have.
    """
    card = next((card for card in cards if card["name"] == name), None)
    if card is None:
        card = {"name": name, "tag": str(LoraTag(name)), "colour": _free_colour(cards), "picked": True}
        cards = [*cards, card]
    tag = _changed(name, fields_of(card, known), fields, known)
    cards = [{**card, "on": on, "tag": str(tag)} if old["name"] == name else old for old in cards]
    return with_tag(prompt, name, tag if on else None, known), cards


def _changed(name: str, before: Mapping[str, Any], fields: Mapping[str, Any], known: Collection[str]) -> LoraTag:
    """The tag of a LoRA with some fields changed."""
    texts = {key: value or "" for key, value in {**before, **fields}.items()}
    texts |= {"word": "|".join(texts["word"]), "region": "" if texts["region"] == AUTO else texts["region"]}
    if before["te"] == before["unet"] == texts["te"]:  # one strength for both stays the same for both
        texts["te"] = texts["unet"]
    arguments = [f"{key}={' '.join(text.split())}" for key, text in texts.items() if text.strip()]
    if bad := next((argument for argument in arguments if re.search("[:<>]", argument)), None):
        raise ValueError(f"{bad!r} contains one of : < >, which end a tag")
    (new,) = parse(f"<lora:{':'.join([name, *arguments])}>", known).tags
    return new


def with_tag(prompt: str, name: str, tag: LoraTag | None, known: Collection[str]) -> str:
    """The prompt with this tag in place of the LoRA's old one, or at the end; None removes it. The rest stays as typed."""
    if name not in [old.name for old in parse_named(prompt, known).tags]:
        return prompt if tag is None else f"{prompt.rstrip()} {tag}".strip()

    def put(found: re.Match[str]) -> str:
        (old,) = parse_named(found["tag"], known).tags
        return found[0] if old.name != name else "" if tag is None else f"{found['space']}{tag}"

    return re.sub(rf"(?P<space>[^\S\n]*)(?P<tag>{TAG.pattern})", put, prompt).strip()


def triggers_in(prompt: str, triggers: Collection[str]) -> list[str]:
    """The trigger words that are in the prompt, outside its tags, found as binding finds them."""
    text = _without_tags(prompt)
    return [trigger for trigger in triggers if spans(text, trigger)]


def with_triggers(prompt: str, before: Collection[str], chosen: Collection[str], known: Collection[str]) -> str:
    """The prompt with newly chosen trigger words added, and with those that are no longer chosen removed."""
    missing = [each for each in chosen if each not in (*before, *triggers_in(parse(prompt, known).text, chosen))]
    for word in (each for each in before if each not in chosen):
        for begin, after in reversed(spans(_without_tags(prompt), word)):
            kept, rest = re.sub(r",?[^\S\n]*\Z", "", prompt[:begin]), prompt[after:]  # without the comma before it
            if not kept or kept.endswith("\n"):
                rest = re.sub(r"^[^\S\n]*,?[^\S\n]*", "", rest)  # or, at the start of a line, after it
            prompt = kept + rest
        prompt = prompt.strip(" ,")
    if not missing:
        return prompt
    text = re.sub(rf"(?:\s*{TAG.pattern})*\s*$", "", prompt)  # without its last tags
    end = prompt[len(text) :] if text else f" {prompt}"
    return (", ".join([*filter(None, [text.rstrip(" ,")]), *missing]) + end).rstrip()


def bare_tags(prompt: str) -> dict[str, tuple[int, int]]:
    """What stands between commas in a prompt, outside its LoRAs' tags: its words without an article, in lower case -> where
    it first stands, with its article."""
    found: dict[str, tuple[int, int]] = {}
    for piece in re.finditer(r"[^\s,|][^,|\n]*", _without_tags(prompt)):
        words = piece[0].rstrip()
        found.setdefault(ARTICLE.sub("", words).casefold(), (piece.start(), piece.start() + len(words)))
    return found


def listed(prompt: str, words: Collection[str]) -> str:
    """The prompt with two or more of its `bare_tags` as a list of things: "fox, owl, ink" -> "a fox and an owl, ink"."""
    wanted = {word.casefold() for word in words}
    places = sorted(place for word, place in bare_tags(prompt).items() if word in wanted)
    *first, last = (_with_article(ARTICLE.sub("", prompt[begin:end])) for begin, end in places)
    for begin, end in reversed(places[1:]):
        prompt = re.sub(r",?\s*\Z", "", prompt[:begin]) + prompt[end:]
    begin, end = places[0]
    return f"{prompt[:begin]}{', '.join(first)} and {last}{prompt[end:]}"


def _with_article(thing: str) -> str:
    """ "a fox", "an owl"; but "french fries" and names, "Miku" or "sks_v2", as they are."""
    is_name = re.search(r"[A-Z\d_]|(?<![sui])s$", thing) is not None
    return thing if is_name else f"an {thing}" if thing[0] in "aeio" else f"a {thing}"


def _without_tags(prompt: str) -> str:
    """The prompt with marks in place of its tags, as long as they are."""
    return TAG.sub(lambda tag: "|" * len(tag[0]), prompt)


def parse_lock(text: str, experts: Collection[str]) -> dict[str, float]:
    """Parse weights set by hand: "fox=1, ink=0.2" -> {"fox": 1.0, "ink": 0.2}. Raises ValueError that names the LoRAs."""
    weights = {}
    for pair in text.split(","):
        name, equals, value = (word.strip() for word in pair.partition("="))
        if not equals:
            raise ValueError(f"{pair.strip()!r} is not NAME=WEIGHT; the LoRAs are {', '.join(experts)}")
        if name not in experts:
            raise ValueError(f"there is no LoRA {name!r} in this picture; the LoRAs are {', '.join(experts)}")
        weights[name] = number(value, f"the weight of {name!r}")
    return weights
