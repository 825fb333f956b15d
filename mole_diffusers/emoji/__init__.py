"""The embedded world: a real Stable Diffusion in small, its drawings, its judge."""

from mole_diffusers.emoji.compositions import TEST, VALIDATION, Concepts
from mole_diffusers.emoji.drawings import Drawings, default_folder
from mole_diffusers.emoji.scenes import Scene, canvas, composition_scene, draw_scene, scene_in
from mole_diffusers.emoji.words import (
    BACKGROUNDS,
    BASE_STYLES,
    BASE_SUBJECTS,
    HELD_OUT_STYLES,
    HELD_OUT_SUBJECTS,
    OTHER_STYLES,
    OTHER_SUBJECTS,
    STYLES,
    SUBJECTS,
    TEST_STYLES,
    TEST_SUBJECTS,
    VALIDATION_STYLES,
    VALIDATION_SUBJECTS,
    is_unseen,
)

__all__ = [
    "BACKGROUNDS",
    "BASE_STYLES",
    "BASE_SUBJECTS",
    "HELD_OUT_STYLES",
    "HELD_OUT_SUBJECTS",
    "OTHER_STYLES",
    "OTHER_SUBJECTS",
    "STYLES",
    "SUBJECTS",
    "TEST",
    "TEST_STYLES",
    "TEST_SUBJECTS",
    "VALIDATION",
    "VALIDATION_STYLES",
    "VALIDATION_SUBJECTS",
    "Concepts",
    "Drawings",
    "Scene",
    "canvas",
    "composition_scene",
    "default_folder",
    "draw_scene",
    "is_unseen",
    "scene_in",
]
