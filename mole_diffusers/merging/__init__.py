"""Training-free merges: several LoRAs become one ordinary LoRA. The maths imports torch only."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
