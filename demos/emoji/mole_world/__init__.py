"""The embedded world: a small but real Stable Diffusion, with its drawings and its judge."""

from mole_world import words
from mole_world.compositions import TEST, VALIDATION, Concepts
from mole_world.drawings import Drawings, default_folder
from mole_world.scenes import Scene, canvas, composition_scene, scene_in
from mole_world.world import EmojiWorld, concept_files, emoji_world, gate_folders

__all__ = [
    "TEST",
    "VALIDATION",
    "Concepts",
    "Drawings",
    "EmojiWorld",
    "Scene",
    "canvas",
    "composition_scene",
    "concept_files",
    "default_folder",
    "emoji_world",
    "gate_folders",
    "scene_in",
    "words",
]
