"""Training: gates over finished LoRAs, from prompts or pictures, and concept LoRAs from pictures."""

from mole_diffusers.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, __file__)
