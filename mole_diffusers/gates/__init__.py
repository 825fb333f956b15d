"""Gates turn the state of a block, a layer or the prompt (or nothing) into one weight per expert."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
