"""LoraRetriever (Zhao et al., 2024) for concept LoRAs: find the LoRAs that a prompt needs, and compose them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
