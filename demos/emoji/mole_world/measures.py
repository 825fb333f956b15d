"""What a picture of the emoji world shows, measured from its pixels: no judge, no model.

Colours are in 0..255. Pictures are RGB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from PIL import Image

from mole_world.drawings import Drawings
from mole_world.landscapes import LIGHTS, lit
from mole_world.scenes import CONTACTS, STACKED, Scene

SIZES, OVERLAPS, SHIFTS = (51, 54, 57), (0.24, 0.3, 0.36), (-1, 0, 1)  # where subjects in contact are looked for


def touches_as_said(picture: Image.Image, drawings: Drawings, scene: Scene) -> bool:
    """Whether two subjects in contact stand as their relation says, with the right one in front.

    The picture is compared with true drawings of both subjects, in many places and in each light. Where it is closest to
    them outside of their overlap, their overlap decides. If a relation puts one above the other or makes one smaller, the
    two with exchanged parts must be farther away.

    Args:
        scene: what the caption says, with a relation of CONTACTS.
    """
    pixels, relation = np.asarray(picture, np.float32), scene.relation or ""
    found = _closest(pixels, drawings, scene)
    if relation in (*STACKED, "holding"):
        exchanged = _closest(pixels, drawings, replace(scene, subjects=scene.subjects[::-1]))
        if exchanged.outside < found.outside:
            return False
    return found.overlap[CONTACTS[relation]] < found.overlap[1 - CONTACTS[relation]]


@dataclass(frozen=True)
class _Distance:
    """Mean differences of colours: outside of the overlap, and in it if the first or the second subject is in front."""

    outside: float
    overlap: tuple[float, float]


def _closest(pixels: np.ndarray, drawings: Drawings, scene: Scene) -> _Distance:
    """The distance of a picture [H, W, 3] from two subjects, in the closest place and light."""
    best = _Distance(np.inf, (0.0, 0.0))
    for size, hidden, mirrored in product(SIZES, OVERLAPS, (False, True)):
        if mirrored and scene.relation in STACKED:
            continue
        layers = []
        for subject, (side, x, y) in zip(scene.subjects, drawings.touching(scene, size, hidden, mirrored), strict=True):
            layer = Image.new("RGBA", scene.size)
            layer.paste(drawings.drawing(subject, scene.style, side), (x, y))
            layers.append(np.asarray(layer, np.float32))
        first, second = (layer[..., 3] > 230 for layer in layers)
        both, outside = first & second, first ^ second
        alone = np.where(first[..., None], layers[0][..., :3], layers[1][..., :3])
        for light, x, y in product(LIGHTS, SHIFTS, SHIFTS):
            seen = np.roll(pixels, (-y, -x), (0, 1))
            error = float(np.abs(seen[outside] - lit(alone[outside], light)).mean())
            if error < best.outside:
                fronts = tuple(float(np.abs(seen[both] - lit(layer[both][:, :3], light)).sum()) for layer in layers)
                best = _Distance(error, (fronts[0], fronts[1]))
    return best
