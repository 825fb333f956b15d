"""What a picture shows, its caption, and where its subjects stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mole_diffusers.emoji.words import BACKGROUNDS, STYLES, SUBJECTS

SIDE = 64  # pixels: the side of the square for one subject
ACROSS, UPRIGHT = ("left of", "right of"), ("above", "below")  # where the first subject stands relative to the others
RELATIONS = ACROSS + UPRIGHT
FIRST = ("left of", "above")  # with these, the order of naming is the order of places
Box = tuple[int, int, int]  # a square: its size, and x and y of its upper left corner, in pixels


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeio" else f"a {word}"


@dataclass(frozen=True)
class Scene:
    """One to four subjects in one style on one background.

    Attributes:
        subjects: the subjects in the order in which they are named. It does not say where they stand.
        relation: where the first subject stands relative to the others, one of RELATIONS; None leaves all places free.
        upright: whether the canvas of two subjects stands on its short side. It is ignored if there is a relation.
    """

    subjects: tuple[str, ...]
    style: str
    background: str = "white"
    relation: str | None = None
    upright: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.subjects) <= 4:
            raise ValueError(f"a scene has one to four subjects, not {len(self.subjects)}")
        if self.relation is not None and (self.relation not in RELATIONS or len(self.subjects) not in (2, 3)):
            raise ValueError(f"no relation {self.relation!r} among {len(self.subjects)} subjects; relations: {RELATIONS}")

    @property
    def caption(self) -> str:
        """ "<style> drawing of a <subject> [and|<relation> a <subject> ...] [on a <colour> background]"."""
        first, *others = (article(s) for s in self.subjects)
        named = f"{first} {self.relation} {' and '.join(others)}" if self.relation else " and ".join([first, *others])
        text = f"{self.style} drawing of {named}"
        return text if self.background == "white" else f"{text} on a {self.background} background"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the canvas in pixels. Subjects are 50 to 58 pixels large."""
        count = len(self.subjects)
        if count == 2:
            upright = self.relation in UPRIGHT if self.relation else self.upright
            return (SIDE, 2 * SIDE) if upright else (2 * SIDE, SIDE)
        side = SIDE if count == 1 else 2 * SIDE
        return side, side


_NAMED = re.compile(rf"\b({'|'.join(sorted(SUBJECTS, key=len, reverse=True))})(?:e?s)?\b")  # "hot dog" before "dog"


def scene_in(prompt: str) -> Scene | None:
    """The scene that a prompt describes, or None if it names no subject.

    It has up to four subjects, a style ("noto" if the prompt has none), a background and a relation. The world's words count
    anywhere in the prompt. A plural is one subject.
    """
    text = " ".join(re.findall("[a-z]+", prompt.lower()))
    subjects = tuple(dict.fromkeys(_NAMED.findall(text)))[:4]
    if not subjects:
        return None
    style = next((word for word in text.split() if word in STYLES), "noto")
    background = next((colour for colour in BACKGROUNDS if f" {colour} background" in text), "white")
    relation = next((r for r in RELATIONS if f" {r} " in text), None) if len(subjects) in (2, 3) else None
    return Scene(subjects, style, background, relation)


def canvas(prompt: str) -> tuple[int, int]:
    """Width and height in pixels at which the base draws a prompt, by the number of subjects that it names."""
    scene = scene_in(prompt)
    return scene.size if scene else (SIDE, SIDE)


def composition_scene(concepts: Sequence[str]) -> Scene:
    """The scene of a composition: its subjects in its style, or in noto if it has none."""
    styles = [c for c in concepts if c in STYLES]
    return Scene(tuple(c for c in concepts if c not in STYLES), styles[0] if styles else "noto")


def places(scene: Scene) -> list[Box]:
    """A box per subject, in the order named: 54 pixels large, near the middle of its square. They do not overlap."""
    return [(54, x + 5, y + 5) for x, y in squares(scene)]


def squares(scene: Scene, order: Callable[[int], np.ndarray] = np.arange) -> list[tuple[int, int]]:
    """The upper left corner of each subject's square, in pixels. `order` permutes the places that are free."""
    width, height = scene.size
    if len(scene.subjects) != 3:
        whole = [(x, y) for y in range(0, height, SIDE) for x in range(0, width, SIDE)]
        if scene.relation:
            return whole if scene.relation in FIRST else whole[::-1]
        return [whole[i] for i in order(len(whole))]
    turned = order(4)
    relation = scene.relation or RELATIONS[int(turned[0])]
    others = [int(i) for i in turned if i < 2]
    near, far = (0, SIDE) if relation in FIRST else (SIDE, 0)  # coordinate of the first subject, and of the others
    if relation in ACROSS:
        return [(near, SIDE // 2), *((far, i * SIDE) for i in others)]
    return [(SIDE // 2, near), *((i * SIDE, far) for i in others)]
