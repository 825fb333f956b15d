"""The random scenes for all training here: what they show and where, and what the base must not see."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from mole_world.captions import FORMS, TAGGED
from mole_world.drawings import Drawings
from mole_world.scenes import CONTACTS, RELATIONS, SIDE, Box, Scene, cell, squares
from mole_world.words import BACKGROUNDS, LIGHTS, OPEN, PLACES

SMALLEST, LARGEST = 50, 58  # pixels of a subject's side in a square of SIDE pixels
SHIFT = 1  # most pixels that a subject is off the middle of its square: what captions do not say is blurred at first
OVERLAPS = (0.22, 0.38)  # share of the smaller of two subjects in contact that overlaps with the other
UNSEEN_SHARE = 0.15


def is_unseen(subject: str, style: str) -> bool:
    """Whether the base must not see this base subject in this base style, so that we can test if it composes.

    A hash of the two words decides, so the choice does not change when words are added. Noto is always seen, so that each
    subject has a drawing that says what it is.
    """
    if style == "noto":
        return False
    return int(hashlib.sha256(f"{subject}|{style}".encode()).hexdigest()[:8], 16) / 2**32 < UNSEEN_SHARE


def draw_scene(
    subjects: Sequence[str],
    styles: Sequence[str],
    rng: np.random.Generator,
    *,
    count: int,
    allowed: Callable[[str, str], bool] | None = None,
    placed: float = 0.2,
    touching: float = 0.0,
) -> Scene:
    """A random scene of `count` different subjects, four in five of them in a landscape, open or named, and in any light.

    Args:
        allowed: allowed(subject, style) says which cells may be drawn; None allows all.
        placed: the share of scenes with two or three subjects whose caption says places.
        touching: the share of scenes of two subjects that are in contact.
    """
    style, chosen = _cell(subjects, styles, rng, count, allowed)
    kind = rng.random()
    background = OPEN if kind < 0.35 else str(rng.choice(list(PLACES if kind < 0.8 else BACKGROUNDS)))
    background = "white" if kind > 0.9 else background
    light = str(rng.choice(list(LIGHTS))) if background not in BACKGROUNDS and rng.random() < 0.4 else None
    relation = None
    if count == 2 and rng.random() < touching:
        relation = str(rng.choice(list(CONTACTS)))
    elif count in (2, 3) and rng.random() < placed:
        relation = str(rng.choice(RELATIONS))
    return Scene(chosen, style, background, relation, bool(rng.integers(2)), light)


def _cell(
    subjects: Sequence[str],
    styles: Sequence[str],
    rng: np.random.Generator,
    count: int,
    allowed: Callable[[str, str], bool] | None,
) -> tuple[str, tuple[str, ...]]:
    """A style, and different subjects that may be drawn in it."""
    style = str(rng.choice(styles))
    open_to = [s for s in subjects if allowed is None or allowed(s, style)]
    return style, tuple(str(s) for s in rng.choice(open_to, count, replace=False))


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in a random wording; the first one is the most frequent."""
    plain = [i for i in range(len(FORMS)) if i not in TAGGED or scene.relation is None]
    return scene.worded(0 if rng.random() < 0.25 else int(rng.choice(plain)), int(rng.integers(12)))


def random_picture(drawings: Drawings, scene: Scene, rng: np.random.Generator, freedom: float = 1.0) -> Image.Image:
    """The scene as RGB, `scene.size` large, with random sizes and places.

    A light that is left open is day in seven of ten landscapes, sunset or night in the others.
    """
    scene, boxes, seed = random_layout(drawings, scene, rng, freedom)
    return drawings.picture(scene, boxes, seed=seed)


def random_layout(
    drawings: Drawings, scene: Scene, rng: np.random.Generator, freedom: float = 1.0
) -> tuple[Scene, list[Box], int]:
    """What `random_picture` draws: the scene in its light, a box per subject, and the seed of the landscape."""
    boxes = touching(drawings, scene, rng, freedom) if scene.relation in CONTACTS else scattered(scene, rng, freedom)
    seed = int(rng.integers(2**31))
    if scene.light is None and scene.background not in BACKGROUNDS:
        scene = replace(scene, light=str(rng.choice(list(LIGHTS), p=(0.7, 0.15, 0.15))))
    return scene, boxes, seed


def scattered(scene: Scene, rng: np.random.Generator, freedom: float = 1.0) -> list[Box]:
    """A box per subject. They do not overlap, and squares that the scene does not decide are random.

    Args:
        freedom: how far sizes and places in a square may be from `mole_world.scenes.places`, in 0..1.
    """
    corners = squares(scene, rng.permutation)
    boxes = [_within_square(rng, freedom, cell(scene)) for _ in corners]
    return [(size, x + dx, y + dy) for (x, y), (size, dx, dy) in zip(corners, boxes, strict=True)]


def touching(drawings: Drawings, scene: Scene, rng: np.random.Generator, freedom: float = 1.0) -> list[Box]:
    """A box per subject of two in contact. Which side the first one stands on is random, unless the relation says it."""
    size = round(54 + freedom * (rng.uniform(SMALLEST, LARGEST) - 54))
    return drawings.touching(scene, size, rng.uniform(*OVERLAPS), mirrored=bool(rng.integers(2)))


def _within_square(rng: np.random.Generator, freedom: float, side: int) -> Box:
    """A box near the middle of a square of `side` pixels: a UNet knows places only from its padding."""
    size = round((54 + freedom * (rng.uniform(SMALLEST, LARGEST) - 54)) * side / SIDE)
    x, y = (round((side - size) / 2 + freedom * v) for v in rng.uniform(-SHIFT, SHIFT, 2))
    return size, x, y
