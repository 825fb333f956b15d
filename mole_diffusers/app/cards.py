"""The mixer's cards: a view of the prompt's tags. What is typed wins; a card switched off keeps its strength."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from mole_diffusers.prompt_syntax import parse
from mole_diffusers.recipe import with_strength

Card = dict[str, Any]  # name, on, strength


def cards_of(prompt: str, cards: Sequence[Card], known: Collection[str]) -> list[Card]:
    """The cards after a change of the prompt: a tag's strength is the card's, a card without a tag is off."""
    tags = {tag.name: tag.unet(0, 1) for tag in parse(prompt, known).tags}
    if unknown := [name for name in tags if name not in known]:
        raise ValueError(f"there is no LoRA {unknown[0]!r}; known: {', '.join(known)}")
    old = [{**card, "on": card["name"] in tags, "strength": tags.get(card["name"], card["strength"])} for card in cards]
    names = {card["name"] for card in cards}
    return old + [{"name": name, "on": True, "strength": value} for name, value in tags.items() if name not in names]


def set_card(prompt: str, cards: Sequence[Card], card: Card, known: Collection[str]) -> tuple[str, list[Card]]:
    """Prompt and cards after one card was moved or switched; it is added where it is new."""
    if card["on"]:
        prompt = with_strength(prompt, card["name"], card["strength"], known)
    else:
        prompt = without(prompt, card["name"], known)
    changed = [card if old["name"] == card["name"] else old for old in cards]
    return prompt, changed if card in changed else [*changed, card]


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
