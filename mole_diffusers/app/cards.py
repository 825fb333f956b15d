"""The mixer's cards: a view of the prompt's tags. What is typed wins; a card switched off keeps its whole tag."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mole_diffusers.inspection.gate_figures import COLOURS
from mole_diffusers.studio.prompt_syntax import LoraTag, constant, parse

Card = dict[str, Any]  # name, on, tag (its text), colour (a number of COLOURS)
FIELDS = ("unet", "te", "lbw", "start", "stop")  # of a tag, as a card shows them


def cards_of(prompt: str, cards: Sequence[Card], known: Collection[str]) -> list[Card]:
    """The cards after a change of the prompt: a tag in it is the card's, a card without one is off."""
    tags = {tag.name: str(tag) for tag in parse(prompt, known).tags}
    if unknown := [name for name in tags if name not in known]:
        raise ValueError(f"there is no LoRA {unknown[0]!r}; known: {', '.join(known)}")
    found = [{**card, "on": card["name"] in tags, "tag": tags.get(card["name"], card["tag"])} for card in cards]
    for name in tags:
        if name not in [card["name"] for card in found]:
            found.append({"name": name, "on": True, "tag": tags[name], "colour": _free(found)})
    return found


def _free(cards: Sequence[Card]) -> int:
    """The first colour that no card has, so that a LoRA keeps its own whatever comes and goes."""
    taken = [card["colour"] for card in cards]
    return min(range(len(COLOURS)), key=lambda i: (taken.count(i), i))


def shades(cards: Sequence[Card]) -> dict[str, str]:
    """LoRA -> its colour."""
    return {card["name"]: COLOURS[card["colour"]] for card in cards}


def tag_of(card: Card, known: Collection[str]) -> LoraTag:
    """What a card's tag asks for. Raises ValueError for a name that no tag can hold."""
    if not (tags := parse(card["tag"], known).tags):
        raise ValueError(f"the name {card['name']!r} holds < or >, which end a tag; rename the file")
    return tags[0]


def fields_of(card: Card, known: Collection[str]) -> dict[str, str]:
    """The tag field by field, as it is typed: "unet" is the strength, a number or a list over the steps."""
    tag = tag_of(card, known)
    stop = "" if tag.stop is None else str(tag.stop)
    return {"unet": str(tag.unet), "te": str(tag.te), "lbw": tag.lbw, "start": str(tag.start or ""), "stop": stop}


def with_fields(card: Card, fields: Mapping[str, str], known: Collection[str]) -> Card:
    """The card with its tag as the fields say. Raises ValueError for what no tag can be."""
    words = [f"{key}={fields[key].replace(' ', '')}" for key in FIELDS if fields[key].strip()]
    if bad := next((word for word in words if re.search("[:<>]", word)), None):
        raise ValueError(f"{bad!r} holds one of : < >, which end a tag")
    (tag,) = parse(f"<lora:{':'.join([card['name'], *words])}>", known).tags
    return {**card, "tag": str(tag)}


def moved(card: Card, strength: float, known: Collection[str]) -> Card:
    """The card at one strength in every part; blocks and steps stay."""
    tag = tag_of(card, known)
    return {**card, "tag": str(replace(tag, te=constant(strength), unet=constant(strength)))}


def set_card(prompt: str, cards: Sequence[Card], card: Card, known: Collection[str]) -> tuple[str, list[Card]]:
    """Prompt and cards after one card was changed or switched."""
    parsed = parse(prompt, known)
    tags = {tag.name: tag for tag in parsed.tags} | {card["name"]: tag_of(card, known)}
    if not card["on"]:
        del tags[card["name"]]
    changed = [card if old["name"] == card["name"] else old for old in cards]
    return str(replace(parsed, tags=tuple(tags.values()))), changed


def added(prompt: str, cards: Sequence[Card], name: str, known: Collection[str]) -> tuple[str, list[Card]]:
    """Prompt and cards with one LoRA on: at 1 where it is new, else as its card has it."""
    card = next((card for card in cards if card["name"] == name), None)
    if card is None:
        card = {"name": name, "on": True, "tag": str(LoraTag(name)), "colour": _free(cards)}
        cards = [*cards, card]
    return set_card(prompt, cards, {**card, "on": True}, known)


def without(prompt: str, name: str, known: Collection[str]) -> str:
    """The prompt without the tag of one LoRA."""
    parsed = parse(prompt, known)
    return str(replace(parsed, tags=tuple(tag for tag in parsed.tags if tag.name != name)))


def with_preset(prompt: str, name: str, preset: str, known: Collection[str]) -> str:
    """The prompt with the block weights of one LoRA's tag set, "" for none. Raises ValueError where it has no tag."""
    parsed = parse(prompt, known)
    if name not in [tag.name for tag in parsed.tags]:
        raise ValueError(f"the prompt has no tag for {name!r}")
    return str(replace(parsed, tags=tuple(replace(t, lbw=preset) if t.name == name else t for t in parsed.tags)))


def with_words(prompt: str, words: Collection[str], chosen: Collection[str], known: Collection[str]) -> str:
    """The prompt with the chosen ones of some trigger words in it, and the others out of it."""
    parsed = parse(prompt, known)
    text = parsed.text
    for word in words:
        there = word in text
        if word in chosen and not there:
            text = f"{text}, {word}".removeprefix(", ")
        elif word not in chosen and there:
            text = re.sub(rf",?\s*{re.escape(word)}", "", text, count=1).strip(" ,")
    return str(replace(parsed, text=text))


def locks_of(text: str, experts: Collection[str]) -> dict[str, float]:
    """ "fox=1, ink=0.2" -> weights. Raises ValueError naming what is known."""
    weights = {}
    for pair in text.split(","):
        name, equals, value = (word.strip() for word in pair.partition("="))
        try:
            weights[name] = float(value)
        except ValueError:
            raise ValueError(f"{pair.strip()!r} is not NAME=WEIGHT; the LoRAs are {', '.join(experts)}") from None
        if name not in experts:
            raise ValueError(f"there is no LoRA {name!r} in this picture; the LoRAs are {', '.join(experts)}")
    return weights
