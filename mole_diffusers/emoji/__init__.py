"""The embedded world: a small but real Stable Diffusion, with its drawings and its judge."""

from mole_diffusers.emoji import words
from mole_diffusers.emoji.compositions import TEST, VALIDATION, Concepts
from mole_diffusers.emoji.drawings import Drawings, default_folder
from mole_diffusers.emoji.scenes import Scene, canvas, composition_scene, scene_in

__all__ = [
    "TEST",
    "VALIDATION",
    "Concepts",
    "Drawings",
    "Scene",
    "canvas",
    "composition_scene",
    "default_folder",
    "scene_in",
    "words",
]
