"""The random scenes for all training here: what they show and where, and what the base must not see."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from mole_diffusers.emoji.drawings import Drawings
from mole_diffusers.emoji.scenes import RELATIONS, SIDE, Box, Scene, squares
from mole_diffusers.emoji.words import BACKGROUNDS

SMALLEST, LARGEST = 50, 58  # pixels of a subject's side
SHIFT = 1  # most pixels that a subject is off the middle of its square: what captions do not say is blurred at first
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
) -> Scene:
    """A random scene of `count` different subjects. A third of scenes have a coloured background.

    Args:
        allowed: allowed(subject, style) says which cells may be drawn; None allows all.
        placed: the share of scenes with two or three subjects whose caption says places.
    """
    style = str(rng.choice(styles))
    open_to = [s for s in subjects if allowed is None or allowed(s, style)]
    chosen = tuple(str(s) for s in rng.choice(open_to, count, replace=False))
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 1 / 3 else "white"
    relation = str(rng.choice(RELATIONS)) if count in (2, 3) and rng.random() < placed else None
    return Scene(chosen, style, background, relation, bool(rng.integers(2)))


def random_picture(drawings: Drawings, scene: Scene, rng: np.random.Generator, freedom: float = 1.0) -> Image.Image:
    """The scene as RGB, `scene.size` large, with random sizes and places, see `scattered`."""
    return drawings.picture(scene, scattered(scene, rng, freedom))


def scattered(scene: Scene, rng: np.random.Generator, freedom: float = 1.0) -> list[Box]:
    """A box per subject. They do not overlap, and squares that the scene does not decide are random.

    Args:
        freedom: how far sizes and places in a square may be from `mole_diffusers.emoji.scenes.places`, in 0..1.
    """
    corners = squares(scene, rng.permutation)
    return [(size, x + dx, y + dy) for x, y in corners for size, dx, dy in [_within_square(rng, freedom)]]


def _within_square(rng: np.random.Generator, freedom: float) -> Box:
    """A box near the middle of a square of SIDE pixels: a UNet knows places only from its padding."""
    size = round(54 + freedom * (rng.uniform(SMALLEST, LARGEST) - 54))
    x, y = (round((SIDE - size) / 2 + freedom * v) for v in rng.uniform(-SHIFT, SHIFT, 2))
    return size, x, y
