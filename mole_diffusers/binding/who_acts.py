"""Who acts on a text, and in a picture of it where and why, as far as the text says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from mole_diffusers.binding.config import Bound
from mole_diffusers.binding.regions import AUTO, EVERYWHERE
from mole_diffusers.binding.sentence import Contact, Sentence, Who, parse

EVERY_PLACE, OWN_PLACE, OWN_TILE, INACTIVE = "everywhere", "own", "own tile", "inactive"
UNBOUND = "nothing is bound"
MOST_NAMED = 5  # LoRAs in a sentence


def read_prompt(prompt: str, bound: Sequence[Bound], acting: Sequence[bool]) -> Sentence:
    """What a prompt says, given each expert's words and region, and who is on, [N] each."""
    return parse(prompt, [b.words for b in bound], who_counts(bound, acting))


def who_counts(bound: Sequence[Bound], acting: Sequence[bool]) -> Who:
    """What texts are read for, given each expert's words and region, and who is on, [N] each."""
    return Who(
        frozenset(k for k, on in enumerate(acting) if on),
        frozenset(k for k, b in enumerate(bound) if b.given is not None),
        frozenset(k for k, b in enumerate(bound) if b.region == EVERYWHERE),
    )


def present(bound: Sequence[Bound], acting: Sequence[bool], mentioned: Sequence[bool]) -> tuple[bool, ...]:
    """[N]: the experts that act on a text: those that are on, but not those that it should name and does not."""
    return tuple(on and (said or not b.needs_words) for b, on, said in zip(bound, acting, mentioned, strict=True))


def notices(
    names: Sequence[str], bound: Sequence[Bound], acting: Sequence[bool], mentioned: Sequence[bool]
) -> Iterator[str]:
    """What a user should know about who acts on a text that has these experts' words."""
    there = present(bound, acting, mentioned)
    for name, own, on, acts, said in zip(names, bound, acting, there, mentioned, strict=True):
        words = ", ".join(own.words)
        if on and not acts:
            yield f"expert {name!r} is inactive: the prompt has none of its words, {words}"
        elif on and own.words and not said:
            where = "everywhere" if own.given is None else "in its region"
            yield f"expert {name!r} acts {where}: the prompt has none of its words, {words}"
        elif on and not own.words and own.region == AUTO and sum(there) > 1:
            yield f"expert {name!r} acts everywhere: it has no words of its own, so give it some with bind"


def without_words(bound: Mapping[str, Bound]) -> str:
    """A sentence on several experts of which none has words, so that no text is read for them; "" for others."""
    names = [name for name, own in bound.items() if own.region == AUTO]
    if len(bound) < 2 or not names or any(own.words for own in bound.values()):
        return ""
    named = " and ".join(map(repr, names[:MOST_NAMED]))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (
        f"no words of {named}{more} are known, so they act everywhere, as with set_adapters: give each its words, as in "
        f"mixture.bind({{{names[0]!r}: 'a fox'}}), or 'everywhere'"
    )


# ---- explanations of a prompt, before anything is drawn


@dataclass(frozen=True)
class Role:
    """What one expert does in a picture.

    Attributes:
        place: "everywhere", "own" for a place of its own, "own tile" for a subject that touches another and is drawn by
            itself in some steps, "with NAME" for the place of another expert's subject, or "inactive".
        words: its words in the prompt, as they stand there.
        why: the reason for the place.
    """

    place: str
    words: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Explanation:
    """How a prompt is read. Printed, it is a table.

    Attributes:
        experts: name -> its role.
        tiles: the prompts of the subjects that are first drawn apart, from left to right as named; None if the picture is
            drawn as one. `why_no_tiles` says why.
        contacts: the subjects that touch.
        unread: the end of the prompt, if it is longer than what any text encoder reads.
        tiled: the shares of the steps between which tiles are drawn, such as (0.4, 0.8); None without tiles or a size.
        room: the smallest width and height in pixels at which tiles are drawn, if a picture of the given size is too small
            for them, and if there is such a size.
    """

    experts: Mapping[str, Role]
    tiles: list[str] | None
    why_no_tiles: str = ""
    contacts: tuple[Contact, ...] = ()
    unread: str = ""
    tiled: tuple[float, float] | None = None
    room: tuple[int, int] | None = None

    @classmethod
    def of_unbound(cls, names: Iterable[str]) -> Explanation:
        """If nothing is bound: all act everywhere."""
        return cls(dict.fromkeys(names, Role(EVERY_PLACE, (), UNBOUND)), None, UNBOUND)

    def __str__(self) -> str:
        rows = [("LoRA", "words", "place", "why")]
        rows += [(name, ", ".join(role.words) or "-", role.place, role.why) for name, role in self.experts.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.tiles is None:
            lines.append(f"no tiles: {self.why_no_tiles}")
        else:
            lines += [f"tile {i}: {prompt}" for i, prompt in enumerate(self.tiles, 1)]
        lines += [f"contact: {contact}" for contact in self.contacts]
        return "\n".join([*lines, *([f"no text encoder reads {self.unread!r}"] if self.unread else [])])


def roles(names: Sequence[str], bound: Sequence[Bound], acting: Sequence[bool], sentence: Sentence) -> dict[str, Role]:
    """Each expert's role in the picture of one prompt. The arguments are [N], but for the prompt's sentence."""
    there = present(bound, acting, sentence.mentioned)
    found = {}
    for k, name in enumerate(names):
        words = tuple(dict.fromkeys(sentence.text[slice(*span)] for span in sorted(sentence.words[k])))
        set_by_user = _set(bound[k], acting[k], there[k], words)
        place, why = set_by_user or _listed(k, names, sentence) or _anywhere(k, bound[k], there, sentence)
        found[name] = Role(place, words, why)
    return found


def _set(own: Bound, is_on: bool, is_there: bool, words: Sequence[str]) -> tuple[str, str] | None:
    """Place and reason if the user has set them, or if none of the expert's words is there."""
    if not is_on:
        return INACTIVE, "it is off, or at strength 0"
    missing = f"the prompt has none of its words: {', '.join(own.words)}" if own.words and not words else ""
    if not is_there:
        return INACTIVE, missing
    if own.region == AUTO:
        return (EVERY_PLACE, missing) if missing else None
    place, why = EVERY_PLACE, "you said so"
    if own.given is not None:
        shown = "of a mask" if isinstance(own.given, Image.Image) else repr(own.given)
        place, why = OWN_PLACE, f"you gave it the region {shown}"
    return place, f"{why}; {missing}" if missing else why


def _listed(k: int, names: Sequence[str], sentence: Sentence) -> tuple[str, str] | None:
    """The same for an expert of a subject that the prompt lists, or of what such a subject wears or holds."""
    for subject in sentence.subjects:
        if k in subject.experts:
            others = ", ".join(repr(other.name) for other in sentence.subjects if other is not subject)
            return OWN_PLACE, f"the prompt lists it beside {others}"
        if k in subject.attribute_adapters:
            owner = names[subject.experts[0]] if subject.experts else subject.name
            return f"with {owner}", f"the prompt says it of {subject.name!r}"
    return None


def _anywhere(k: int, own: Bound, there: Sequence[bool], sentence: Sentence) -> tuple[str, str]:
    """The same for an expert without a place."""
    if sum(there) == 1:
        return EVERY_PLACE, "no other LoRA acts"
    if not own.words:
        return EVERY_PLACE, "it has no words of its own"
    if k in sentence.styles:
        return EVERY_PLACE, "its words name a style, a medium or a setting"
    return EVERY_PLACE, sentence.why_no_places or "it is none of the subjects that the prompt lists"
