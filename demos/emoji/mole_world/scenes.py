"""What a picture shows, its caption, and where its subjects stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mole_world.captions import BETWEEN, PAPER, worded
from mole_world.words import BACKGROUNDS, LIGHTS, OPEN, PLACES, STYLES, SUBJECTS

SIDE = 64  # pixels: the side of the square for one subject
ACROSS, UPRIGHT = ("left of", "right of"), ("above", "below")  # where the first subject stands relative to the others
RELATIONS = ACROSS + UPRIGHT
FIRST = ("left of", "above")  # with these, the order of naming is the order of places
CONTACTS = {  # two subjects overlap: relation -> which of them is in front, 0 or 1
    "riding": 0, "on": 0, "in front of": 0, "hugging": 0, "behind": 1, "holding": 1,
}  # fmt: skip
STACKED = ("riding", "on")  # contacts in which the first subject is above the second
Box = tuple[int, int, int]  # a square: its size, and x and y of its upper left corner, in pixels


@dataclass(frozen=True)
class Scene:
    """One to four subjects in one style, before one background and in one light.

    Attributes:
        subjects: the subjects in the order in which they are named. It does not say where they stand.
        background: paper of a colour of `words.BACKGROUNDS`, a place of `words.PLACES`, or OPEN: some landscape.
        relation: where the first subject stands relative to the others, one of RELATIONS, or for two subjects
            of CONTACTS; None leaves all places free.
        upright: whether the canvas of two subjects stands on its short side. It is ignored if there is a relation.
        light: one of `words.LIGHTS`; None leaves it open. A coloured background has none.
        canvas: width and height in pixels, if they are not those that the subjects need.
    """

    subjects: tuple[str, ...]
    style: str
    background: str = OPEN
    relation: str | None = None
    upright: bool = False
    light: str | None = None
    canvas: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        count = len(self.subjects)
        if not 1 <= count <= 4:
            raise ValueError(f"a scene has one to four subjects, not {count}")
        if self.relation is not None and self.relation not in _possible(count):
            raise ValueError(f"no relation {self.relation!r} among {count} subjects; relations: {_possible(count)}")
        if self.background not in (*BACKGROUNDS, *PLACES, OPEN):
            raise ValueError(f"no background {self.background!r}; there are {[*BACKGROUNDS, *PLACES, OPEN]}")
        if self.light is not None and (self.light not in LIGHTS or self.background in BACKGROUNDS):
            raise ValueError(f"no light {self.light!r} before {self.background!r}; lights of landscapes: {list(LIGHTS)}")

    @property
    def caption(self) -> str:
        """ "<style> drawing of a <subject> [and|<relation> a <subject> ...] [<place>] [<light>]"."""
        return self.worded()

    def worded(self, form: int = 0, way: int = 0) -> str:
        """The caption in another wording, see `captions.worded`."""
        return worded(self.subjects, self.style, self.background, self.relation, self.light, form=form, way=way)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the canvas in pixels."""
        if self.canvas is not None:
            return self.canvas
        count = len(self.subjects)
        if self.relation in CONTACTS:
            return (SIDE, SIDE * 3 // 2) if self.relation in STACKED else (SIDE * 3 // 2, SIDE)
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
    background = next((colour for colour in BACKGROUNDS if f" {colour} background" in text), OPEN)
    background = next((place for place, phrase in (*PLACES.items(), ("white", PAPER)) if phrase in text), background)
    light = None if background in BACKGROUNDS else next((w for w, phrase in LIGHTS.items() if phrase in text), None)
    relation = next((r for r in _possible(len(subjects)) if _is_said(r, subjects, text)), None)
    return Scene(subjects, style, background, relation, light=light)


def _possible(count: int) -> tuple[str, ...]:
    """The relations that `count` subjects can have."""
    return (*RELATIONS, *CONTACTS) if count == 2 else RELATIONS if count == 3 else ()


def _is_said(relation: str, subjects: Sequence[str], text: str) -> bool:
    """Whether a relation stands right between the first two subjects: in "a fox on a bear", not in "a fox on a beach"."""
    first, second = (re.escape(s) for s in subjects[:2])
    between = "|".join(BETWEEN[relation])
    return re.search(rf"\b{first}(?:e?s)? (?:{between}) (?:(?:an?|the) )?{second}", text) is not None


def canvas(prompt: str) -> tuple[int, int]:
    """Width and height in pixels at which the base draws a prompt, by the number of subjects that it names."""
    scene = scene_in(prompt)
    return scene.size if scene else (SIDE, SIDE)


def composition_scene(concepts: Sequence[str]) -> Scene:
    """The scene of a composition: its subjects in its style, or in noto if it has none."""
    styles = [c for c in concepts if c in STYLES]
    return Scene(tuple(c for c in concepts if c not in STYLES), styles[0] if styles else "noto")


def places(scene: Scene) -> list[Box]:
    """A box per subject, in the order named: 54 pixels large, or 40 in a square of 48, near the middle of its square.

    They do not overlap.
    """
    side = cell(scene)
    size = round(side * 54 / SIDE)
    return [(size, x + (side - size) // 2, y + (side - size) // 2) for x, y in squares(scene)]


def in_contact(scene: Scene, size: int, hidden: float, mirrored: bool) -> list[Box]:
    """The boxes of two subjects in contact, in the middle of the canvas. What is held has two thirds of the holder's size.

    Args:
        size: pixels of the first subject's side.
        hidden: share of the smaller one that overlaps with the other, along the line between them.
        mirrored: whether the first stands on the right.
    """
    width, height = scene.size
    other = round(size * 0.66) if scene.relation == "holding" else size
    together = size + other - round(hidden * other)
    if scene.relation in STACKED:
        x, y = (width - size) // 2, (height - together) // 2
        return [(size, x, y), (other, (width - other) // 2, y + together - other)]
    left = (width - together) // 2
    first, second = (left + together - size, left) if mirrored else (left, left + together - other)
    top = (height - size) // 2
    return [(size, first, top), (other, second, top + size - other)]


def cell(scene: Scene) -> int:
    """The side of each subject's square in pixels: SIDE, or less for two on a canvas that is smaller than two squares."""
    if len(scene.subjects) != 2:
        return SIDE
    across, down = _grid(scene)
    return min(SIDE, scene.size[0] // across, scene.size[1] // down)


def squares(scene: Scene, order: Callable[[int], np.ndarray] = np.arange) -> list[tuple[int, int]]:
    """The upper left corner of each subject's square, in pixels. `order` permutes the places that are free.

    A canvas that is larger than its squares has them in its middle.
    """
    width, height = scene.size
    count, side = len(scene.subjects), cell(scene)
    if count != 3:
        across, down = _grid(scene)
        left, top = (width - across * side) // 2, (height - down * side) // 2
        whole = [(left + x * side, top + y * side) for y in range(down) for x in range(across)]
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


def _grid(scene: Scene) -> tuple[int, int]:
    """How many squares of one, two or four subjects stand next to each other, and one below the other."""
    width, height = scene.size
    upright = height > width or (height == width and (scene.relation in UPRIGHT if scene.relation else scene.upright))
    return {1: (1, 1), 2: (1, 2) if upright else (2, 1), 4: (2, 2)}[len(scene.subjects)]
