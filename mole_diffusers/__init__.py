"""Compose several concept LoRAs in one image: learned gates over experts, as a plugin for diffusers."""

from mole_diffusers.lazy import lazy_names

__version__ = "0.1.0"
__getattr__, __all__ = lazy_names(__name__, __file__)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
