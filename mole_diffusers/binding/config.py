"""What a user sets for binding: each expert's words, and where in the picture it acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mole_diffusers.binding.as_text import MASK, mask_text, read_mask
from mole_diffusers.binding.finding import Tokens
from mole_diffusers.binding.regions import AUTO, BOXES, EVERYWHERE, Region, checked_region
from mole_diffusers.binding.sentence import Mention
from mole_diffusers.binding.vocabulary import is_look
from mole_diffusers.binding.words import Subject
from mole_diffusers.lora import Expert
from mole_diffusers.lora.metadata import as_read, plain
from mole_diffusers.lora.own_words import own_words


@dataclass(frozen=True)
class Bound:
    """How one expert is bound.

    Attributes:
        words: the phrases that belong to it. Without any, it acts on every word that belongs to no other expert.
        region: where it acts. "auto" is a place of its own if the prompt lists its subject beside others, otherwise the
            whole picture. "everywhere" is the whole picture, and without words also every word, including those of others.
        required: whether it is inactive if the text has none of its words, as one of a whole folder is. One that a user
            chose acts everywhere then.
    """

    words: tuple[str, ...] = ()
    region: Region = AUTO
    required: bool = False

    @property
    def given(self) -> Region | None:
        """The part of the picture that the user gave; None if it is found, or the whole picture."""
        return None if self.region in (AUTO, EVERYWHERE) else self.region

    @property
    def needs_words(self) -> bool:
        """Whether it is inactive if a text has none of its words."""
        return self.required and bool(self.words)


def given_region(subject: Subject | Mention, bound: Sequence[Bound]) -> Region | None:
    """The region that the user gave for a subject, through one of its experts; None if there is none."""
    return next((given for k in subject.experts if (given := bound[k].given) is not None), None)


def files_bindings(experts: Mapping[str, Expert]) -> dict[str, Bound]:
    """Bind every expert to the words that its file gives beside the others'.

    They count as the file writes them, and without A1111's weights and backslashes. "White dress" calls nobody where the
    file also gives another kind of word, such as a name.
    """
    words = {name: as_read(own.words) for name, own in own_words(experts).items()}
    calling = {name: tuple(word for word in each if not is_look(Tokens(plain(word)).words)) for name, each in words.items()}
    return {name: Bound(calling[name] or each) for name, each in words.items()}


def bound(given: Any, name: str, own: Bound) -> Bound:
    """The user's setting for one expert, as `Bound`.

    Args:
        own: what its file gives.
        given: words, "a fox" or ["a fox", "foxes"]; or (words, region), with None for the words that the file gives; or
            "everywhere": on every word and in the whole picture.

    Raises ValueError, naming the expert, for anything else.
    """
    if isinstance(given, Bound):
        checked_region(given.region, name)
        return given
    if given == EVERYWHERE:
        return Bound((), EVERYWHERE)
    if isinstance(given, str) and given in (AUTO, *BOXES):  # else the region would be a word
        raise ValueError(f"{given!r} is a region: give {name!r} (None, {given!r}), or [{given!r}] if that is its word")
    words: Any = given
    region: Region = AUTO
    if isinstance(given, tuple):
        if len(given) != 2:
            raise ValueError(f"the binding of {name!r} is words, or (words, region), got {given!r}")
        words, region = given
    region = checked_region(region, name)
    if words is None:
        return Bound(own.words, region, own.required)
    words = (words,) if isinstance(words, str) else tuple(words) if isinstance(words, Sequence) else (words,)
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"the words of {name!r} are one or more phrases, got {given!r}")
    return Bound(tuple(_without_article(word) for word in words), region)


def _without_article(phrase: str) -> str:
    first, _, rest = phrase.strip().partition(" ")
    return rest.strip() if first.lower() in ("a", "an", "the") and rest.strip() else phrase.strip()


def bindings(given: Mapping[str, Any] | str, own: Mapping[str, Bound], before: Mapping[str, Bound]) -> dict[str, Bound]:
    """`before`, updated by `given`; `own` is what the files give.

    Raises ValueError for an unknown expert, or anything but a mapping.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f'a binding names experts with their words, as {{"fox": "a fox"}}, or is None, got {given!r}; only attach takes '
            f"{AUTO!r} for all of them, and for one of them (None, {AUTO!r}) says the same"
        )
    if unknown := [name for name in given if name not in own]:
        raise ValueError(f"unknown expert {unknown[0]!r}; attached: {list(own)}")
    return {name: bound(given[name], name, own[name]) if name in given else before[name] for name in own}


def to_json(bound: Bound) -> dict[str, Any]:
    """`bound` as plain data for a file."""
    region: Any = mask_text(bound.region) if isinstance(bound.region, Image.Image) else bound.region
    return {"words": list(bound.words), "region": region, "required": bound.required}


def from_json(values: Any, name: str) -> Bound:
    """The inverse of `to_json`. Raises ValueError, naming the expert, for anything else."""
    try:
        words, region, required = values["words"], values["region"], values["required"]
        if isinstance(region, str) and region.startswith(MASK):
            region = read_mask(region)
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words) or not isinstance(required, bool):
            raise ValueError("words that are no texts")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the binding of {name!r} cannot be read: {error}") from error
    return Bound(tuple(words), checked_region(region, name), required)
