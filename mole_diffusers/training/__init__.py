"""Training: gates over finished LoRAs, from prompts or pictures, and concept LoRAs from pictures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
