"""The embedded world: open emoji drawings, captions and scenes with a ground truth for composition.

Many artists drew the same subjects, each in one style, so "that subject in that style" exists even where no
model has seen it. Beside the drawn styles stand filter styles: exact functions of the noto drawing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64  # pixels of a picture and of an atlas cell
BACKGROUNDS = {
    "white": (255, 255, 255),
    "blue": (150, 190, 250),
    "yellow": (250, 225, 120),
    "green": (150, 215, 150),
    "pink": (250, 175, 200),
    "grey": (150, 150, 155),
}
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def _palette(rgb: np.ndarray, *stops: tuple[int, int, int]) -> np.ndarray:
    """Luminance [H, W] of `rgb` [H, W, 3] looked up on a piecewise linear colour ramp, dark to light."""
    at = np.linspace(0, 255, len(stops))
    luma = rgb @ LUMA
    return np.stack([np.interp(luma, at, [s[c] for s in stops]) for c in range(3)], -1)


def _edges(rgba: np.ndarray) -> np.ndarray:
    """Edge strength [H, W] in 0..1: the largest step of luminance or alpha between neighbours."""
    planes = np.stack([rgba[..., :3] @ LUMA * (rgba[..., 3] / 255), rgba[..., 3]], -1)  # [H, W, 2]
    dy = np.abs(np.diff(planes, axis=0, prepend=planes[:1]))
    dx = np.abs(np.diff(planes, axis=1, prepend=planes[:, :1]))
    return np.clip(np.maximum(dx, dy).max(-1) / 90, 0, 1)


def sepia(rgba: np.ndarray) -> np.ndarray:
    """Browns of an old photograph: luminance on a brown ramp."""
    return np.dstack([_palette(rgba[..., :3], (40, 22, 8), (150, 100, 55), (250, 232, 195)), rgba[..., 3]])


def negative(rgba: np.ndarray) -> np.ndarray:
    """Every colour channel inverted."""
    return np.dstack([255 - rgba[..., :3], rgba[..., 3]])


def mosaic(rgba: np.ndarray) -> np.ndarray:
    """8 x 8-pixel tiles, each the alpha-weighted mean of what it covers."""
    tiles = rgba.reshape(8, 8, 8, 8, 4)  # [row, y, column, x, RGBA]
    alpha = tiles[..., 3:]
    colour = (tiles[..., :3] * alpha).sum((1, 3)) / np.maximum(alpha.sum((1, 3)), 1)  # [8, 8, 3]
    solid = np.where(alpha.mean((1, 3)) > 90, 255, 0)  # [8, 8, 1]
    return np.dstack([colour, solid]).repeat(8, 0).repeat(8, 1)


def neon(rgba: np.ndarray) -> np.ndarray:
    """Glowing edges on near black: edges keep a saturated form of the colour around them."""
    rgb = rgba[..., :3]
    vivid = np.clip((rgb - rgb.min(-1, keepdims=True)) * 2.2 + 60, 0, 255)
    return np.dstack([18 + (vivid - 18) * _edges(rgba)[..., None], rgba[..., 3]])


def duotone(rgba: np.ndarray) -> np.ndarray:
    """Two printing inks: luminance from deep violet to orange."""
    return np.dstack([_palette(rgba[..., :3], (50, 10, 110), (255, 160, 40)), rgba[..., 3]])


def thermal(rgba: np.ndarray) -> np.ndarray:
    """A heat camera's palette over luminance: blue, magenta, red, yellow."""
    stops = ((10, 10, 140), (190, 20, 170), (250, 70, 30), (255, 245, 90))
    return np.dstack([_palette(rgba[..., :3], *stops), rgba[..., 3]])


def blueprint(rgba: np.ndarray) -> np.ndarray:
    """Pale lines on blue: edge strength drawn over a flat blue body."""
    blue, line = np.array([25, 70, 160]), np.array([225, 240, 255])
    return np.dstack([blue + (line - blue) * _edges(rgba)[..., None], rgba[..., 3]])


FILTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    f.__name__: f for f in (sepia, negative, mosaic, neon, duotone, thermal, blueprint)
}
BASE_STYLES = ("noto", "twemoji", "joy", "sepia", "negative", "mosaic", "neon")
HELD_OUT_STYLES = ("glossy", "flat", "ink", "duotone", "thermal", "blueprint")
STYLES = BASE_STYLES + HELD_OUT_STYLES
BASE_SUBJECTS = (
    "bear", "frog", "lion", "panda", "penguin", "owl", "turtle", "butterfly", "lady beetle", "crab", "pig", "cactus",
    "rose", "palm tree", "evergreen tree", "mushroom", "maple leaf", "banana", "carrot", "lemon", "strawberry",
    "grapes", "pineapple", "watermelon", "cherries", "pizza", "hamburger", "eggplant",
)  # fmt: skip
HELD_OUT_SUBJECTS = (
    "fox", "octopus", "sunflower", "doughnut", "honeybee", "french fries", "cheese wedge", "tiger", "koala",
    "tomato", "crocodile", "birthday cake",
)  # fmt: skip
OTHER_SUBJECTS = (  # known to judge and CLIP alone: more ways to be wrong than the base has subjects
    "cat", "elephant", "snail", "dolphin", "snake", "rooster", "monkey", "horse", "camel", "unicorn", "spider",
    "scorpion", "blowfish", "hibiscus", "red apple", "bread", "lollipop", "ear of corn", "shaved ice", "egg",
)  # fmt: skip
SUBJECTS = BASE_SUBJECTS + HELD_OUT_SUBJECTS + OTHER_SUBJECTS

# Defaults and grids are chosen on the validation concepts; the test concepts and their prompts decide nothing.
VALIDATION_SUBJECTS = ("fox", "octopus", "koala", "tomato")
VALIDATION_STYLES = ("ink", "duotone")
TEST_SUBJECTS = tuple(s for s in HELD_OUT_SUBJECTS if s not in VALIDATION_SUBJECTS)
TEST_STYLES = tuple(s for s in HELD_OUT_STYLES if s not in VALIDATION_STYLES)
Concepts = tuple[str, ...]


def _compositions(
    subjects: Sequence[str], styles: Sequence[str], counts: Mapping[str, int]
) -> dict[str, tuple[Concepts, ...]]:
    """Kind -> the first `counts[kind]` compositions; each subject and style comes equally often."""
    n, m = len(subjects), len(styles)
    turns = [(i, (i + 1 + shift) % n) for shift in range(n // 2) for i in range(n) if shift < n // 2 - 1 or i < n // 2]
    pairs: list[Concepts] = [(subjects[i], subjects[j]) for i, j in turns]
    kinds: dict[str, list[Concepts]] = {
        "subject x style": [(subjects[i], styles[(i + shift) % m]) for shift in range(m) for i in range(n)],
        "subject + subject": pairs,
        "two subjects + style": [(*pair, styles[i % m]) for i, pair in enumerate(pairs)],
        "three subjects": [(subjects[i], subjects[(i + 1) % n], subjects[(i + 3) % n]) for i in range(n)],
    }
    return {kind: tuple(kinds[kind][:count]) for kind, count in counts.items()}


TEST = _compositions(
    TEST_SUBJECTS,
    TEST_STYLES,
    {"subject x style": 24, "subject + subject": 12, "two subjects + style": 12, "three subjects": 8},
)
TRAINED = {"subject x style": 12, "subject + subject": 8, "two subjects + style": 8}  # the first of each have gates
VALIDATION = _compositions(
    VALIDATION_SUBJECTS, VALIDATION_STYLES, {"subject x style": 8, "subject + subject": 6, "two subjects + style": 6}
)
COMPOSITIONS = tuple(c for kind, count in TRAINED.items() for c in TEST[kind][:count])
COMPARED = tuple(c for kind in TRAINED for c in TEST[kind][:8])  # every family of gates and every ceiling has these
VALIDATED = tuple(c for group in VALIDATION.values() for c in group[:4])  # what trained gates are chosen on


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeio" else f"a {word}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one to three subjects from left to right, one style, one background."""

    subjects: tuple[str, ...]
    style: str
    background: str = "white"

    @property
    def caption(self) -> str:
        """ "<style> drawing of a <subject> [and a <subject>] [on a <colour> background]"."""
        text = f"{self.style} drawing of {' and '.join(article(s) for s in self.subjects)}"
        return text if self.background == "white" else f"{text} on a {self.background} background"


def composition_scene(concepts: Sequence[str]) -> Scene:
    """What a composition asks for: its subjects in its style, or in noto's where it names none."""
    styles = [c for c in concepts if c in STYLES]
    return Scene(tuple(c for c in concepts if c not in STYLES), styles[0] if styles else "noto")


class Drawings:
    """The artists' drawings and the pictures made of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.layout = json.loads((folder / "atlas.json").read_text())
        self._cache: dict[tuple[str, str], Image.Image] = {}

    @cached_property
    def _atlas(self) -> Image.Image:
        return Image.open(self.folder / "atlas.webp").convert("RGBA")

    def drawing(self, subject: str, style: str) -> Image.Image:
        """The drawing of `subject` in `style`, 64 x 64 RGBA; raises KeyError naming what is missing."""
        if (subject, style) not in self._cache:
            self._cache[subject, style] = self._drawing(subject, style)
        return self._cache[subject, style]

    def _drawing(self, subject: str, style: str) -> Image.Image:
        if style in FILTERS:
            rgba = np.asarray(self.drawing(subject, "noto"), np.float32)
            return Image.fromarray(FILTERS[style](rgba).clip(0, 255).astype(np.uint8), "RGBA")
        subjects, styles = self.layout["subjects"], self.layout["styles"]
        if subject not in subjects or style not in styles:
            raise KeyError(f"no drawing of {subject!r} in {style!r}; styles: {[*styles, *FILTERS]}")
        cell = subjects.index(subject) * len(styles) + styles.index(style)
        x, y = cell % self.layout["columns"] * SIZE, cell // self.layout["columns"] * SIZE
        return self._atlas.crop((x, y, x + SIZE, y + SIZE))

    def picture(self, scene: Scene, rng: np.random.Generator | None = None) -> Image.Image:
        """The scene as 64 x 64 RGB. With `rng` sizes and places vary; without, they are the middle of their range."""
        canvas = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.background])
        for subject, (size, x, y) in zip(scene.subjects, places(len(scene.subjects), rng), strict=True):
            drawing = self.drawing(subject, scene.style).resize((size, size), Image.Resampling.BOX)
            canvas.paste(drawing, (x, y), drawing)
        return canvas


def places(count: int, rng: np.random.Generator | None) -> list[tuple[int, int, int]]:
    """(size, x, y) in pixels per subject: one of 55..57 near the middle, two of 30 or three of 20 side by side."""
    if count == 1:
        size = 56 if rng is None else int(rng.integers(55, 58))
        x, y = (4, 4) if rng is None else (int(v) for v in rng.integers(2, 6, 2))
        return [(size, x, y)]
    size, step = {2: (30, 32), 3: (20, 21)}[count]
    high = SIZE // 2 - size // 2  # y of a subject in the middle
    jitter = [(1, high)] * count
    if rng is not None:
        jitter = [(int(rng.integers(0, 3)), int(rng.integers(high - 2, high + 3))) for _ in range(count)]
    return [(size, step * slot + min(dx, step - size), y) for slot, (dx, y) in enumerate(jitter)]


def draw_scene(subjects: Sequence[str], styles: Sequence[str], rng: np.random.Generator, *, pairs: float) -> Scene:
    """A random scene; `pairs` is the share with two different subjects; a third have a coloured background."""
    count = 2 if rng.random() < pairs else 1
    chosen = tuple(str(s) for s in rng.choice(subjects, count, replace=False))
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 1 / 3 else "white"
    return Scene(chosen, str(rng.choice(styles)), background)


def default_folder() -> Path:
    """Where the world's files lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "emoji_assets", package.parent / "demos" / "emoji" / "assets"):
        if (folder / "atlas.json").exists():
            return folder
    raise FileNotFoundError("the emoji world is not part of this installation; install from the repository")
