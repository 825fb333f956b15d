"""Cases of published protocols, with prompts made from the LoRAs' own trigger words.

- `composlora`: the sets of ComposLoRA (Zhong et al., 2402.16843): a character with one LoRA each of one to four other kinds,
  and a prompt that lists all trigger words.
- `pairs`, `triples`: every two and three subjects together, as in MC++ (Jiang et al., 2404.05268).
- `neutral`, `occlusion`, `interaction`: the three difficulties of Chen et al. (2603.26078), for 2, 4, .. 10 subjects.
- `scenes`, `contact`: two subjects in one place with one light; and in touch, one in front of the other.
- `styles`: a subject with a style or a background.

The wordings are our own: scores are comparable between composers on the same LoRAs, and not with those of the papers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from mole_diffusers.lora import Expert, as_read
from mole_world.evaluation.runner import Case

SUBJECTS = ("character", "object", "clothing")  # kinds of concepts that are somewhere in a picture
KINDS = (*SUBJECTS, "style", "background")
GROUPS = (2, 4, 6, 8, 10)  # subjects in a picture

TOGETHER = ("a photo of {all}", "{all} in a bright room", "{all} on a wooden table", "{all} in a garden")
NEUTRAL = ("{all} side by side", "{all} next to each other, seen from the front", "a group picture of {all}")
OCCLUSION = (
    "{first} in front, and {rest} partly hidden behind",
    "{all} in a narrow doorway, each partly covering the next",
    "{all} behind a low fence, close together",
)
INTERACTION = ("{all} hugging", "{all} playing together", "{all} dancing together")
SCENES = (
    "{all} on a beach",
    "{all} in a forest",
    "{all} in a city street at night",
    "{all} in the snow",
    "{all} on a hill at sunset",
)
CONTACT = ("{first} riding {rest}", "{first} holding {rest}", "{first} on top of {rest}", "{first} leaning on {rest}")


@dataclass(frozen=True)
class Concept:
    """What one LoRA draws.

    Attributes:
        words: its trigger words; the first ones name it in a prompt.
        kind: one of `KINDS`.
        subject: the words that a detector looks for.
    """

    name: str
    words: tuple[str, ...]
    kind: str
    subject: str

    @property
    def phrase(self) -> str:
        """How a sentence names it: "a sks dog"; a character has no article, as a person's name."""
        first, _, rest = self.words[0].partition(" ")
        if self.kind not in ("object", "clothing") or (rest and first.lower() in ("a", "an", "the")):
            return self.words[0]
        return f"{'an' if first[:1].lower() in tuple('aeiou') else 'a'} {self.words[0]}"


def concept_of(expert: Expert, *, kind: str = "", subject: str = "") -> Concept:
    """What an expert draws. Without trigger words in its file, it is named as the file is.

    Args:
        kind: one of `KINDS`. By default the folder that the file is in, or what its name starts with, as in ComposLoRA:
            character/mary.safetensors, style_2.safetensors. All others are objects.
        subject: the words that a detector looks for; by default the first trigger words.

    Raises ValueError for another kind.
    """
    if kind and kind not in KINDS:
        raise ValueError(f"the kind of {expert.name!r} is one of {', '.join(KINDS)}, got {kind!r}")
    file = Path(expert.source)
    words = tuple(as_read((phrase,))[-1] for phrase in expert.triggers) or (file.stem.replace("_", " "),)
    return Concept(expert.name, words, kind or _kind_of(file), subject or words[0])


def _kind_of(file: Path) -> str:
    for text in (file.parent.name, file.stem.partition("_")[0]):
        for kind in KINDS:
            if text.lower() in (kind, f"{kind}s"):
                return kind
    return "object"


def own_prompt(concept: Concept) -> str:
    """A prompt for one concept alone."""
    return f"a photo of {concept.phrase}" if concept.kind in SUBJECTS else f"a house by a lake, {concept.phrase}"


def cases(concepts: Sequence[Concept], names: Sequence[str] = (), *, limit: int | None = None) -> list[Case]:
    """The cases of protocols, by default of all that these LoRAs allow.

    Args:
        names: of `PROTOCOLS`.
        limit: cases of each kind. They are taken from all over the LoRAs, and the same ones each time.

    Raises ValueError for an unknown protocol, for one that these LoRAs do not allow, and if they allow none.
    """
    if unknown := [name for name in names if name not in PROTOCOLS]:
        raise ValueError(f"unknown protocols {unknown}; known: {list(PROTOCOLS)}")
    found = {name: [case for kind in PROTOCOLS[name](concepts) for case in kind[:limit]] for name in names or PROTOCOLS}
    if missing := [name for name in names if not found[name]]:
        raise ValueError(f"these LoRAs do not allow the protocols {missing}: {_count(concepts)}; see --kind")
    if not any(found.values()):
        raise ValueError(f"no protocol is for these LoRAs: {_count(concepts)}; see --kind")
    return [case for group in found.values() for case in group]


def _count(concepts: Sequence[Concept]) -> str:
    counts = {kind: sum(concept.kind == kind for concept in concepts) for kind in KINDS}
    return ", ".join(f"{count} of kind {kind}" for kind, count in counts.items() if count)


ConceptGroup = tuple[Concept, ...]


def _spread(groups: Sequence[ConceptGroup]) -> list[ConceptGroup]:
    """In an order that does not start with every group of the first LoRA."""
    return sorted(groups, key=lambda group: zlib.crc32("+".join(concept.name for concept in group).encode()))


def _subjects(concepts: Sequence[Concept]) -> list[Concept]:
    return [concept for concept in concepts if concept.kind in ("character", "object")]


def _groups(concepts: Sequence[Concept], size: int) -> list[ConceptGroup]:
    """Every pair and triple of subjects. Of larger groups one per subject, because there would be too many."""
    subjects = _subjects(concepts)
    if size <= 3:
        return _spread(list(combinations(subjects, size)))
    ring = [group[0] for group in _spread([(subject,) for subject in subjects])]
    starts = range(len(ring) if len(ring) > size else 1 if len(ring) == size else 0)
    return [tuple((ring + ring)[start : start + size]) for start in starts]


def _told(kind: str, groups: Sequence[ConceptGroup], wordings: Sequence[str]) -> list[Case]:
    """A case per group, in turns with each of the wordings."""
    found = []
    for i, group in enumerate(groups):
        names = [concept.phrase for concept in group]
        parts = {"all": _listed(names), "first": names[0], "rest": _listed(names[1:])}
        found.append(Case(tuple(concept.name for concept in group), kind, wordings[i % len(wordings)].format(**parts)))
    return found


def _listed(names: Sequence[str]) -> str:
    """Names as "a fox, a hat and an owl"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


Kinds = Iterator[list[Case]]  # the cases of one kind after the other


def _together(name: str, wordings: Sequence[str], *sizes: int) -> Callable[[Sequence[Concept]], Kinds]:
    """So many subjects; a kind for each size."""

    def made(concepts: Sequence[Concept]) -> Kinds:
        for size in sizes:
            yield _told(name if len(sizes) == 1 else f"{name}, {size} subjects", _groups(concepts, size), wordings)

    return made


def _composlora(concepts: Sequence[Concept]) -> Kinds:
    by_kind = {kind: [concept for concept in concepts if concept.kind == kind] for kind in KINDS}
    for size in range(2, len(KINDS) + 1):
        others = combinations([kind for kind in KINDS if kind != "character"], size - 1)
        groups = [group for kinds in others for group in product(by_kind["character"], *(by_kind[kind] for kind in kinds))]
        found = []
        for group in _spread(groups):
            prompt = ", ".join(word for concept in group for word in concept.words)
            found.append(Case(tuple(concept.name for concept in group), f"composlora, {size} LoRAs", prompt))
        yield found


def _styles(concepts: Sequence[Concept]) -> Kinds:
    whole = [concept for concept in concepts if concept.kind not in SUBJECTS]
    yield _told("styles", _spread(list(product(_subjects(concepts), whole))), ("{first}, {rest}",))


PROTOCOLS: dict[str, Callable[[Sequence[Concept]], Kinds]] = {
    "composlora": _composlora,
    "pairs": _together("pairs", TOGETHER, 2),
    "triples": _together("triples", TOGETHER, 3),
    "styles": _styles,
    "neutral": _together("neutral", NEUTRAL, *GROUPS),
    "occlusion": _together("occlusion", OCCLUSION, *GROUPS),
    "interaction": _together("interaction", INTERACTION, *GROUPS),
    "scenes": _together("scenes", SCENES, 2),
    "contact": _together("contact", CONTACT, 2),
}
