"""Compose several concept LoRAs in one image: learned gates over experts, as a plugin for diffusers."""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
