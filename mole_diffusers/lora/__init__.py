"""LoRA files -> Expert, whichever tool wrote them. Each layer keeps its own scale from the file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
